//! The access walk: every RPC of the contract, tried with every kind of caller.
//!
//! Nothing is listed by hand: an RPC is covered the day it is added to the protos.

use bytes::Bytes;
use prost::Message as _;
use tollkeeper::{model::Scope, proto::tollkeeper::admin::v1::DisableServiceAccountRequest};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::{
    descriptor::{self, Rpc, Rule},
    harness::{Raw, TestApp, reason},
};

/// A caller that proves to be something, or fails to.
#[derive(Clone, Debug)]
enum Caller {
    Nobody,
    /// A value of `authorization` that is no credential of ours.
    Wrong(String),
    DisabledUser(String),
    LoggedOut(String),
    DisabledService(String),
    /// Of a user, or of an administrator: that makes no difference.
    ApiKey(String),
    User,
    AdminUser,
    Service {
        key: String,
        scopes: Vec<Scope>,
    },
}

/// What the rule makes of a caller.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Admitted,
    Refused(Code, &'static str),
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_admits_whom_its_rule_names_and_nobody_else() {
    let app = TestApp::spawn().await;
    let rpcs = descriptor::rpcs();
    assert!(rpcs.len() >= 22, "the walk found {} RPCs", rpcs.len());
    let (user, admin) = (app.user().create().await, app.user().admin().create().await);
    let standing = standing_callers(&app).await;
    let mut failures = Vec::new();
    for rpc in &rpcs {
        let mut callers = standing.clone();
        callers.extend(service_callers(&app, &rpc.rule).await);
        callers.extend([Caller::User, Caller::AdminUser]);
        for caller in callers {
            // Afresh for every call: some RPCs end the session that calls them.
            let authorization = match &caller {
                Caller::User => Some(bearer(&app.login(&user).await.access_token)),
                Caller::AdminUser => Some(bearer(&app.login(&admin).await.access_token)),
                caller => caller.authorization(),
            };
            let got = verdict(&call(&app, rpc, authorization.as_deref()).await);
            let declared = caller.expected(&rpc.rule);
            if got.as_ref() != Ok(&declared) {
                failures.push(format!(
                    "{} {caller:?}: {got:?}, declared {declared:?}",
                    rpc.path
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_scope_is_named() {
    let app = TestApp::spawn().await;
    let (_, gateway) = app.service("gateway", &["gateway"]).await;
    let (_, other) = app.service("other", &["quota"]).await;
    for rpc in descriptor::rpcs().iter().filter(|rpc| rpc.rule.service) {
        let lacking = match rpc.rule.scope.as_str() {
            "gateway" => &other,
            _ => &gateway,
        };
        let status = call(&app, rpc, Some(&bearer(lacking))).await.unwrap_err();
        let info = status.get_details_error_info().unwrap();
        assert_eq!(
            info.metadata.get("scope"),
            Some(&rpc.rule.scope),
            "{}",
            rpc.path
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_credential_is_said_to_be_the_callers_own() {
    let app = TestApp::spawn().await;
    for rpc in descriptor::rpcs().iter().filter(|rpc| !rpc.rule.public) {
        let status = call(&app, rpc, Some("Bearer garbage")).await.unwrap_err();
        let info = status.get_details_error_info().unwrap();
        let credential = info.metadata.get("credential").map(String::as_str);
        assert_eq!(credential, Some("authorization"), "{}", rpc.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_credentials_in_one_call_are_refused() {
    let app = TestApp::spawn().await;
    let mut request = Request::new(Bytes::new());
    for _ in 0..2 {
        let value = bearer(&app.service_key).parse().unwrap();
        request.metadata_mut().append("authorization", value);
    }
    let path = "/tollkeeper.usage.v1.UsageService/ListTiers";
    let status = Raw::send(&app.channel, path, request).await.unwrap_err();
    assert_eq!(reason(&status), "CREDENTIAL_INVALID");
}

#[test]
fn rpcs_that_manage_credentials_or_sessions_ask_for_a_session() {
    let asking: Vec<String> = descriptor::rpcs()
        .into_iter()
        .filter(|rpc| rpc.rule.session_only)
        .map(|rpc| rpc.path.rsplit('/').next().unwrap().to_owned())
        .collect();
    for method in [
        "Logout",
        "ListSessions",
        "RevokeSession",
        "RevokeAllSessions",
        "UpdateCurrentUser",
        "ChangePassword",
        "EnrollTotp",
        "ConfirmTotp",
        "DisableTotp",
        "RegenerateRecoveryCodes",
        "SendEmailVerification",
        "CreateApiKey",
        "ListApiKeys",
        "RevokeApiKey",
    ] {
        assert!(asking.iter().any(|asking| asking == method), "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_path_is_unimplemented_for_every_caller() {
    let app = TestApp::spawn().await;
    for path in [
        "/tollkeeper.auth.v1.AuthService/Logon",
        "/tollkeeper.auth.v1.AuthService/login",
        "/tollkeeper.auth.v1.AuthService/Login/",
        "/tollkeeper.auth.v1.AuthService/",
        "/tollkeeper.auth.v2.AuthService/Login",
        "/tollkeeper.admin.v1.AdminService/%43reateUser",
        "/no.such.Service/Do",
        "/grpc.health.v1.Health/Chek",
        "/",
    ] {
        for credential in [None, Some("garbage"), Some(app.service_key.as_str())] {
            let answer = Raw::call(&app.channel, path, Bytes::new(), credential).await;
            let status = answer.expect_err(path);
            assert_eq!(status.code(), Code::Unimplemented, "{path} {credential:?}");
            assert_eq!(reason(&status), "UNKNOWN_METHOD", "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_answers_anyone() {
    let app = TestApp::spawn().await;
    for credential in [None, Some("garbage")] {
        let path = "/grpc.health.v1.Health/Check";
        let answer = Raw::call(&app.channel, path, Bytes::new(), credential).await;
        answer.expect("answered");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_is_off_where_the_setting_says_so() {
    let app = TestApp::spawn_with(|settings| settings.server.reflection = false).await;
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let request = Request::new(Bytes::new());
        let status = Raw::open(&app.channel, &path, request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
        assert_eq!(reason(&status), "UNKNOWN_METHOD", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_plain_user_nor_an_administrators_api_key_may_name_another() {
    let app = TestApp::spawn().await;
    let (me, other) = (app.user().create().await, app.user().create().await);
    let admin = app.user().admin().create().await;
    let token = app.login(&me).await.access_token;
    let key = app.api_key(&admin, &["admin"]).await.text;
    let rpcs = rpcs_that_name_a_user();
    for (rpc, credential) in rpcs.iter().flat_map(|rpc| [(rpc, &token), (rpc, &key)]) {
        let named = naming(rpc, &other.id);
        let status = Raw::call(&app.channel, &rpc.path, named, Some(credential)).await;
        let status = status.expect_err(&rpc.path);
        assert_eq!(status.code(), Code::PermissionDenied, "{}", rpc.path);
        assert_eq!(reason(&status), "CALLER_NOT_ALLOWED", "{}", rpc.path);
        // Nor is it said whether the other exists.
        let nobody = naming(rpc, "01890a5d-ac96-774b-bcce-b302099a8057");
        let answer = Raw::call(&app.channel, &rpc.path, nobody, Some(credential)).await;
        assert_eq!(answer.unwrap_err().code(), Code::PermissionDenied);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_user_may_name_oneself() {
    let app = TestApp::spawn().await;
    let me = app.user().create().await;
    let token = app.login(&me).await.access_token;
    for rpc in rpcs_that_name_a_user() {
        for id in [me.id.clone(), me.id.to_uppercase(), String::new()] {
            let named = naming(&rpc, &id);
            let answer = Raw::call(&app.channel, &rpc.path, named, Some(&token)).await;
            answer.expect(&rpc.path);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_and_a_service_may_name_a_user() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (_, service) = app.service("reader", &["usage.read"]).await;
    let admin = app.admin_token().await;
    for rpc in rpcs_that_name_a_user() {
        for credential in [&admin, &service] {
            let named = naming(&rpc, &user.id);
            let answer = Raw::call(&app.channel, &rpc.path, named, Some(credential)).await;
            answer.expect(&rpc.path);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_must_name_a_user() {
    let app = TestApp::spawn().await;
    for rpc in rpcs_that_name_a_user() {
        let key = Some(app.service_key.as_str());
        let answer = Raw::call(&app.channel, &rpc.path, Bytes::new(), key).await;
        let status = answer.expect_err(&rpc.path);
        assert_eq!(status.code(), Code::InvalidArgument, "{}", rpc.path);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "user_id", "{}", rpc.path);
    }
}

impl Caller {
    fn authorization(&self) -> Option<String> {
        match self {
            Self::Nobody => None,
            Self::Wrong(value) => Some(value.clone()),
            Self::DisabledUser(credential)
            | Self::ApiKey(credential)
            | Self::LoggedOut(credential)
            | Self::DisabledService(credential)
            | Self::Service {
                key: credential, ..
            } => Some(bearer(credential)),
            Self::User | Self::AdminUser => unreachable!("logs in for every call"),
        }
    }

    /// What `access.proto` promises this caller under a rule.
    fn expected(&self, rule: &Rule) -> Verdict {
        let refused = |reason| Verdict::Refused(Code::Unauthenticated, reason);
        let admitted = |admitted: bool| {
            let reason = "CALLER_NOT_ALLOWED";
            let denied = Verdict::Refused(Code::PermissionDenied, reason);
            if admitted { Verdict::Admitted } else { denied }
        };
        match self {
            _ if rule.public => Verdict::Admitted,
            Self::Nobody => refused("CREDENTIAL_MISSING"),
            Self::Wrong(_) => refused("CREDENTIAL_INVALID"),
            Self::DisabledUser(_) | Self::DisabledService(_) => refused("ACCOUNT_DISABLED"),
            Self::LoggedOut(_) => refused("SESSION_ENDED"),
            Self::ApiKey(_) if rule.session_only => {
                Verdict::Refused(Code::PermissionDenied, "SESSION_REQUIRED")
            }
            Self::ApiKey(_) | Self::User => admitted(rule.user),
            Self::AdminUser => admitted(rule.user || rule.admin),
            Self::Service { .. } if !rule.service && !rule.admin => admitted(false),
            Self::Service { scopes, .. } => {
                let has = |name: &str| scopes.iter().any(|scope| scope.as_str() == name);
                if (rule.service && has(&rule.scope)) || (rule.admin && has("admin")) {
                    Verdict::Admitted
                } else {
                    Verdict::Refused(Code::PermissionDenied, "SCOPE_MISSING")
                }
            }
        }
    }
}

/// The callers that stay what they are.
async fn standing_callers(app: &TestApp) -> Vec<Caller> {
    // {"typ":"at+jwt","alg":"EdDSA","kid":"x"} · {"iss":"tollkeeper","aud":"tollkeeper","exp":1}
    let old = "eyJ0eXAiOiJhdCtqd3QiLCJhbGciOiJFZERTQSIsImtpZCI6IngifQ\
               .eyJpc3MiOiJ0b2xsa2VlcGVyIiwiYXVkIjoidG9sbGtlZXBlciIsImV4cCI6MX0.c2lnbmF0dXJl";
    let good = app.service_key.as_str();
    let mut unknown_key = good.to_owned();
    unknown_key.replace_range(10..11, if &good[10..11] == "x" { "y" } else { "x" });
    let user = app.user().create().await;
    let revoked = app.api_key(&user, &[]).await;
    app.revoke_api_key(&user, &revoked.id).await;
    let wrong = [
        bearer(&revoked.text),
        bearer(&revoked.text[..52]),
        bearer("garbage"),
        bearer(""),
        bearer(old),
        bearer(&unknown_key),
        format!("Basic {good}"),
        good.to_owned(),
        String::new(),
    ];
    let mut callers = vec![Caller::Nobody];
    callers.extend(wrong.map(Caller::Wrong));

    let disabled = app.user().admin().create().await;
    let token = app.login(&disabled).await.access_token;
    let key = app.api_key(&disabled, &[]).await;
    app.disable(&disabled.id).await;
    callers.push(Caller::DisabledUser(token));
    callers.push(Caller::DisabledUser(key.text));

    let admin = app.user().admin().create().await;
    for owner in [&user, &admin] {
        // Scopes of an API key mean nothing here, whatever they are called.
        let key = app.api_key(owner, &all_scopes()).await;
        callers.push(Caller::ApiKey(key.text));
    }

    let gone = app.user().admin().create().await;
    let token = app.login(&gone).await.access_token;
    app.logout(&token).await;
    callers.push(Caller::LoggedOut(token));

    let (service_account_id, key) = app.service("disabled", &all_scopes()).await;
    let request = DisableServiceAccountRequest { service_account_id };
    app.admin(good)
        .disable_service_account(request)
        .await
        .unwrap();
    callers.push(Caller::DisabledService(key));
    callers
}

/// Services with exactly what a rule asks for, with all but that, with each scope alone.
async fn service_callers(app: &TestApp, rule: &Rule) -> Vec<Caller> {
    let is_needed = |scope: &Scope| scope.as_str() == rule.scope;
    let (_, others): (Vec<_>, Vec<_>) = Scope::ALL.into_iter().partition(is_needed);
    let neither = others
        .iter()
        .copied()
        .filter(|scope| *scope != Scope::Admin);
    let mut sets: Vec<Vec<Scope>> = Scope::ALL.map(|scope| vec![scope]).to_vec();
    sets.push(neither.collect());
    sets.push(others);
    sets.push(Scope::ALL.to_vec());
    let mut callers = Vec::new();
    for scopes in sets {
        let names: Vec<&str> = scopes.iter().map(|scope| scope.as_str()).collect();
        let name = format!("s{}", uuid::Uuid::now_v7().simple());
        let (_, key) = app.service(&name, &names).await;
        callers.push(Caller::Service { key, scopes });
    }
    callers
}

fn all_scopes() -> [&'static str; Scope::ALL.len()] {
    Scope::ALL.map(Scope::as_str)
}

/// Calls with an empty message.
async fn call(app: &TestApp, rpc: &Rpc, authorization: Option<&str>) -> Result<(), Status> {
    let mut request = Request::new(Bytes::new());
    if let Some(value) = authorization {
        let value = value.parse().expect("ASCII");
        request.metadata_mut().insert("authorization", value);
    }
    let mut answer = Raw::open(&app.channel, &rpc.path, request)
        .await?
        .into_inner();
    // A stream may stay silent for long; that it opened is the answer.
    if !rpc.server_streaming {
        answer.message().await?;
    }
    Ok(())
}

/// Whether access let the call through. An error of a handler counts as let through.
fn verdict(answer: &Result<(), Status>) -> Result<Verdict, String> {
    let Err(status) = answer else {
        return Ok(Verdict::Admitted);
    };
    let reason = reason(status);
    let refusals = [
        (Code::Unauthenticated, "CREDENTIAL_MISSING"),
        (Code::Unauthenticated, "CREDENTIAL_INVALID"),
        (Code::Unauthenticated, "SESSION_ENDED"),
        (Code::Unauthenticated, "ACCOUNT_DISABLED"),
        (Code::PermissionDenied, "CALLER_NOT_ALLOWED"),
        (Code::PermissionDenied, "SCOPE_MISSING"),
        (Code::PermissionDenied, "SESSION_REQUIRED"),
    ];
    let refusal = refusals
        .iter()
        .find(|refusal| **refusal == (status.code(), reason.as_str()));
    match (refusal, status.code()) {
        (Some((code, reason)), _) => Ok(Verdict::Refused(*code, reason)),
        // No mails are sent here.
        (None, Code::InvalidArgument | Code::FailedPrecondition) => Ok(Verdict::Admitted),
        (None, _) => Err(format!("{status:?}")),
    }
}

/// The RPCs that act on the caller or on whom a service or an administrator names.
fn rpcs_that_name_a_user() -> Vec<Rpc> {
    let names_user = |rpc: &Rpc| {
        let fields = descriptor::fields(&rpc.input);
        rpc.rule.user && rpc.rule.service && fields.iter().any(|field| field.name == "user_id")
    };
    let rpcs: Vec<Rpc> = descriptor::rpcs().into_iter().filter(names_user).collect();
    assert!(rpcs.len() >= 2, "the walk found {}", rpcs.len());
    rpcs
}

/// A message of an RPC in which `user_id` alone is set.
fn naming(rpc: &Rpc, user_id: &str) -> Bytes {
    let fields = descriptor::fields(&rpc.input);
    let field = fields.iter().find(|field| field.name == "user_id").unwrap();
    assert_eq!(field.number, 1, "UserId below has the number 1");
    let message = UserId {
        user_id: user_id.to_owned(),
    };
    message.encode_to_vec().into()
}

#[derive(prost::Message)]
struct UserId {
    #[prost(string, tag = "1")]
    user_id: String,
}

fn bearer(credential: &str) -> String {
    format!("Bearer {credential}")
}
