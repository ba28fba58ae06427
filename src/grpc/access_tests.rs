use super::*;
use crate::{
    model::{ApiKeyId, ScopeSet, ServiceAccountId},
    proto::DESCRIPTOR_SET,
};

fn user(role: Role) -> Principal {
    Principal::User(UserPrincipal {
        id: UserId::new(),
        role,
        credential: UserCredential::Session(SessionId::new()),
    })
}

fn service(scopes: &[Scope]) -> Principal {
    let scopes: ScopeSet = scopes.iter().copied().collect();
    Principal::Service {
        id: ServiceAccountId::new(),
        scopes,
    }
}

fn set_with(rule: Option<Rule>) -> Vec<u8> {
    let method = descriptor::Method {
        name: "Do".to_owned(),
        options: Some(descriptor::MethodOptions { rule }),
    };
    let service = descriptor::Service {
        name: "S".to_owned(),
        method: vec![method],
    };
    let file = descriptor::File {
        package: "p".to_owned(),
        service: vec![service],
    };
    descriptor::FileSet { file: vec![file] }.encode_to_vec()
}

fn rule(callers: &[CallerKind], scope: &str) -> Option<Rule> {
    let callers = callers.iter().map(|kind| i32::from(*kind)).collect();
    Some(Rule {
        callers,
        scope: scope.to_owned(),
        session_only: false,
    })
}

#[test]
fn every_rpc_has_a_rule() {
    let rules = Rules::from_descriptor_set(DESCRIPTOR_SET).expect("valid rules");
    assert!(rules.0.len() >= 22, "{}", rules.0.len());
    assert!(
        rules
            .admission("/tollkeeper.auth.v1.AuthService/Login")
            .expect("known")
            .public
    );
    assert!(
        rules
            .admission("/tollkeeper.auth.v1.AuthService/Logon")
            .is_none()
    );
    assert!(
        rules
            .admission("/grpc.health.v1.Health/Check")
            .expect("known")
            .public
    );
}

#[test]
fn a_missing_or_senseless_rule_is_refused() {
    let refused = |rule| Rules::from_descriptor_set(&set_with(rule)).expect_err("refused");
    assert!(matches!(refused(None), RulesError::Missing { method } if method == "/p.S/Do"));
    for rule in [
        rule(&[], ""),
        rule(&[CallerKind::Unspecified], ""),
        rule(&[CallerKind::Service], ""),
        rule(&[CallerKind::Service], "everything"),
        rule(&[CallerKind::User], "quota"),
    ] {
        assert!(matches!(refused(rule), RulesError::Invalid { .. }));
    }
    let unknown = Some(Rule {
        callers: vec![99],
        scope: String::new(),
        session_only: false,
    });
    assert!(Rules::from_descriptor_set(&set_with(unknown)).is_err());
    let of_nobody = Some(Rule {
        callers: vec![CallerKind::Admin.into()],
        scope: String::new(),
        session_only: true,
    });
    assert!(Rules::from_descriptor_set(&set_with(of_nobody)).is_err());
}

#[test]
fn each_kind_is_admitted_where_it_is_named_and_nowhere_else() {
    let quota = Admission {
        service: Some(Scope::Quota),
        ..Admission::default()
    };
    assert!(quota.admit(&service(&[Scope::Quota])).is_ok());
    assert!(matches!(
        quota.admit(&service(&[Scope::Admin])),
        Err(Error::ScopeMissing(Scope::Quota))
    ));
    assert!(quota.admit(&user(Role::Admin)).is_err());

    let own = Admission {
        user: true,
        ..Admission::default()
    };
    assert!(own.admit(&user(Role::User)).is_ok() && own.admit(&user(Role::Admin)).is_ok());
    assert!(matches!(
        own.admit(&service(&Scope::ALL)),
        Err(Error::CallerNotAllowed)
    ));

    let admin = Admission {
        admin: true,
        ..Admission::default()
    };
    assert!(admin.admit(&user(Role::Admin)).is_ok());
    assert!(admin.admit(&service(&[Scope::Admin])).is_ok());
    assert!(admin.admit(&user(Role::User)).is_err());
    assert!(matches!(
        admin.admit(&service(&[Scope::Quota])),
        Err(Error::ScopeMissing(Scope::Admin))
    ));
}

#[test]
fn an_api_key_passes_as_a_user_where_no_session_is_asked_for() {
    let key = Principal::User(UserPrincipal {
        id: UserId::new(),
        role: Role::User,
        credential: UserCredential::ApiKey(ApiKeyId::new()),
    });
    let own = Admission {
        user: true,
        ..Admission::default()
    };
    assert!(own.admit(&key).is_ok());
    let session = Admission {
        session_only: true,
        ..own
    };
    assert!(session.admit(&user(Role::User)).is_ok());
    assert!(matches!(session.admit(&key), Err(Error::SessionRequired)));
    let admin = Admission {
        admin: true,
        ..Admission::default()
    };
    assert!(matches!(admin.admit(&key), Err(Error::CallerNotAllowed)));
}

#[test]
fn only_a_gateway_of_this_machine_does_without_a_key() {
    let gateway = Admission {
        service: Some(Scope::Gateway),
        ..Admission::default()
    };
    let quota = Admission {
        service: Some(Scope::Quota),
        ..Admission::default()
    };
    let (bare, mut keyed) = (http::HeaderMap::new(), http::HeaderMap::new());
    keyed.insert(AUTHORIZATION, "Bearer x".parse().expect("ASCII"));
    let peer = |text: &str| Some(text.parse::<SocketAddr>().expect("an address"));
    for here in [
        "127.0.0.1:9",
        "127.1.2.3:9",
        "[::1]:9",
        "[::ffff:127.0.0.1]:9",
    ] {
        assert!(gateway.is_for_sidecar(&bare, peer(here)), "{here}");
        assert!(!quota.is_for_sidecar(&bare, peer(here)), "{here}");
        // A key that is shown is looked at.
        assert!(!gateway.is_for_sidecar(&keyed, peer(here)), "{here}");
    }
    for elsewhere in ["10.0.0.1:9", "[::ffff:10.0.0.1]:9", "[fe80::1]:9"] {
        assert!(
            !gateway.is_for_sidecar(&bare, peer(elsewhere)),
            "{elsewhere}"
        );
    }
    assert!(!gateway.is_for_sidecar(&bare, None));
}
