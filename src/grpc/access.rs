//! Who may call what: rules from the protos, enforced before any handler runs.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
};

use chrono::Utc;
use futures_util::future::BoxFuture;
use http::{Request, Response, header::AUTHORIZATION};
use prost::Message as _;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{bearer::bearer, peer::Peer, status};
use crate::{
    auth::{Auth, Principal, UserCredential, UserPrincipal},
    error::{Error, Result},
    model::{Role, Scope, ScopeSet, SessionId, UserId},
    proto::tollkeeper::access::v1::{CallerKind, Rule},
};

/// Services that are not ours and that anyone may call.
const PUBLIC_SERVICES: [&str; 3] = [
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// What a caller proved to be; in the extensions of every request that reaches a handler.
#[derive(Clone, Debug)]
pub(super) enum Caller {
    Anonymous,
    Known(Principal),
}

impl Caller {
    /// The caller of a request. One without an identity is refused.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Result<&Principal> {
        match request.extensions().get() {
            Some(Self::Known(principal)) => Ok(principal),
            Some(Self::Anonymous) | None => Err(Error::CredentialMissing),
        }
    }

    /// The user who calls.
    pub(super) fn user_of<T>(request: &tonic::Request<T>) -> Result<UserPrincipal> {
        match Self::of(request)? {
            Principal::User(user) => Ok(*user),
            Principal::Service { .. } | Principal::Peer { .. } => Err(Error::CallerNotAllowed),
        }
    }

    /// Who calls, if a user does.
    pub(super) fn user_id_of<T>(request: &tonic::Request<T>) -> Result<Option<UserId>> {
        Ok(match Self::of(request)? {
            Principal::User(user) => Some(user.id),
            Principal::Service { .. } | Principal::Peer { .. } => None,
        })
    }

    /// The user who calls, and the session by which they do. An API key is refused.
    pub(super) fn session_of<T>(request: &tonic::Request<T>) -> Result<(UserId, SessionId)> {
        let user = Self::user_of(request)?;
        match user.credential {
            UserCredential::Session(session) => Ok((user.id, session)),
            UserCredential::ApiKey(_) => Err(Error::SessionRequired),
        }
    }

    /// The user whose data is asked for: the caller, or whom a service or an administrator names.
    pub(super) fn subject_of<T>(
        request: &tonic::Request<T>,
        named: Option<UserId>,
    ) -> Result<UserId> {
        match (Self::of(request)?, named) {
            (Principal::User(user), None) => Ok(user.id),
            (Principal::User(user), Some(named)) if user.id == named => Ok(named),
            (Principal::User(user), Some(named)) if user.role == Role::Admin => Ok(named),
            (Principal::User(_), Some(_)) => Err(Error::CallerNotAllowed),
            (Principal::Service { .. } | Principal::Peer { .. }, Some(named)) => Ok(named),
            (Principal::Service { .. } | Principal::Peer { .. }, None) => Err(Error::invalid(
                "user_id",
                "must name a user: the caller is none",
            )),
        }
    }

    /// Admits those who may read the data of every user: services, by their scope, and administrators.
    pub(super) fn may_read_all<T>(request: &tonic::Request<T>) -> Result<()> {
        match Self::of(request)? {
            Principal::User(user) if user.role == Role::Admin => Ok(()),
            Principal::User(_) => Err(Error::CallerNotAllowed),
            Principal::Service { .. } | Principal::Peer { .. } => Ok(()),
        }
    }
}

/// What the caller of a stream showed: it must stay good for as long as that lasts. `None` is a certificate, by
/// which the connection stands or falls.
pub(super) struct Shown(Option<String>);

impl Shown {
    pub(super) fn by<T>(request: &tonic::Request<T>) -> Result<Self> {
        if matches!(Caller::of(request)?, Principal::Peer { .. }) {
            return Ok(Self(None));
        }
        let headers = request.metadata().clone().into_headers();
        Ok(Self(Some(bearer(&headers)?.to_owned())))
    }

    pub(super) async fn check(&self, auth: &Auth) -> Result<()> {
        if let Some(credential) = &self.0 {
            auth.authenticate(credential, Utc::now()).await?;
        }
        Ok(())
    }
}

/// Who may call each RPC, by its path.
#[derive(Clone, Debug)]
pub struct Rules(Arc<HashMap<String, Admission>>);

/// A rule as enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Admission {
    public: bool,
    user: bool,
    /// Users must have logged in.
    session_only: bool,
    service: Option<Scope>,
    admin: bool,
}

/// A rule that is missing or makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    #[error("the descriptor set cannot be read: {0}")]
    Descriptor(#[from] prost::DecodeError),
    #[error("{method} declares no access rule")]
    Missing { method: String },
    #[error("the access rule of {method} {message}")]
    Invalid {
        method: String,
        message: &'static str,
    },
}

impl Rules {
    /// Reads the rule of every RPC in a descriptor set.
    ///
    /// # Errors
    /// Names the RPC whose rule is missing or invalid: a server must not start without it.
    pub fn from_descriptor_set(bytes: &[u8]) -> Result<Self, RulesError> {
        let mut rules = HashMap::new();
        for file in descriptor::FileSet::decode(bytes)?.file {
            for service in file.service {
                for method in service.method {
                    let path = format!("/{}.{}/{}", file.package, service.name, method.name);
                    let rule = method.options.and_then(|options| options.rule);
                    rules.insert(path.clone(), Admission::of(path, rule)?);
                }
            }
        }
        Ok(Self(Arc::new(rules)))
    }

    /// The paths of all RPCs that have a rule.
    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The scope by which services may call an RPC.
    pub(super) fn service_scope(&self, path: &str) -> Option<Scope> {
        self.0.get(path)?.service
    }

    /// The rule of an RPC; `None` when there is no such RPC.
    fn admission(&self, path: &str) -> Option<Admission> {
        let public = || {
            PUBLIC_SERVICES
                .iter()
                .any(|service| path.starts_with(service))
        };
        match self.0.get(path) {
            Some(admission) => Some(*admission),
            None => public().then_some(Admission {
                public: true,
                ..Admission::default()
            }),
        }
    }
}

impl Admission {
    fn of(method: String, rule: Option<Rule>) -> Result<Self, RulesError> {
        let invalid = |message| RulesError::Invalid {
            method: method.clone(),
            message,
        };
        let Some(rule) = rule else {
            return Err(RulesError::Missing { method });
        };
        let scope = match rule.scope.as_str() {
            "" => None,
            scope => Some(
                scope
                    .parse()
                    .map_err(|_| invalid("names an unknown scope"))?,
            ),
        };
        let mut admission = Self::default();
        for kind in rule.callers() {
            match kind {
                CallerKind::Unspecified => return Err(invalid("names an unknown kind of caller")),
                CallerKind::Public => admission.public = true,
                CallerKind::User => admission.user = true,
                CallerKind::Service => admission.service = scope,
                CallerKind::Admin => admission.admin = true,
            }
        }
        admission.session_only = rule.session_only;
        if admission.session_only && !admission.user {
            return Err(invalid("asks for a session and admits no user"));
        }
        let names_service = rule.callers().any(|kind| kind == CallerKind::Service);
        if names_service != scope.is_some() {
            return Err(invalid("must name a scope exactly when it admits services"));
        }
        if admission == Self::default() {
            return Err(invalid("admits nobody"));
        }
        Ok(admission)
    }

    /// Whether a gateway on this machine asks, without a credential, for what is for gateways.
    fn is_for_sidecar(self, headers: &http::HeaderMap, peer: Option<SocketAddr>) -> bool {
        self.service == Some(Scope::Gateway)
            && !headers.contains_key(AUTHORIZATION)
            && peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback())
    }

    /// Whether a caller may pass.
    fn admit(self, principal: &Principal) -> Result<()> {
        match principal {
            _ if self.public => Ok(()),
            Principal::User(user) => {
                let is_api_key = matches!(user.credential, UserCredential::ApiKey(_));
                if self.user && self.session_only && is_api_key {
                    Err(Error::SessionRequired)
                } else if self.user || (self.admin && user.role == Role::Admin) {
                    Ok(())
                } else {
                    Err(Error::CallerNotAllowed)
                }
            }
            Principal::Service { scopes, .. } => self.admit_scopes(scopes),
            Principal::Peer { scopes } => self.admit_scopes(scopes),
        }
    }

    fn admit_scopes(self, scopes: &ScopeSet) -> Result<()> {
        let mut wanted = self
            .service
            .into_iter()
            .chain(self.admin.then_some(Scope::Admin))
            .peekable();
        let missing = *wanted.peek().ok_or(Error::CallerNotAllowed)?;
        if wanted.any(|scope| scopes.contains(scope)) {
            Ok(())
        } else {
            Err(Error::ScopeMissing(missing))
        }
    }
}

/// Authenticates the caller and holds the rules.
#[derive(Clone)]
pub struct AccessLayer {
    auth: Auth,
    rules: Rules,
    trusts_loopback: bool,
}

impl AccessLayer {
    pub fn new(auth: Auth, rules: Rules) -> Self {
        Self {
            auth,
            rules,
            trusts_loopback: false,
        }
    }

    /// Whoever calls from this machine without a credential may do what gateways do.
    #[must_use]
    pub fn trusting_loopback(self, trusts_loopback: bool) -> Self {
        Self {
            trusts_loopback,
            ..self
        }
    }

    /// The caller of an RPC, if it may call it.
    async fn admit(
        &self,
        admission: Admission,
        headers: &http::HeaderMap,
        peer: &Peer,
    ) -> Result<Caller> {
        let is_trusted = || self.trusts_loopback && admission.is_for_sidecar(headers, peer.address);
        if admission.public || is_trusted() {
            return Ok(Caller::Anonymous);
        }
        let principal = match &peer.scopes {
            // A credential that is shown is looked at, whoever shows it.
            Some(scopes) if !headers.contains_key(AUTHORIZATION) => Principal::Peer {
                scopes: scopes.clone(),
            },
            _ => self.auth.authenticate(bearer(headers)?, Utc::now()).await?,
        };
        admission.admit(&principal)?;
        Ok(Caller::Known(principal))
    }
}

impl<S> Layer<S> for AccessLayer {
    type Service = AccessService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        AccessService {
            access: self.clone(),
            inner,
        }
    }
}

/// See [`AccessLayer`].
#[derive(Clone)]
pub struct AccessService<S> {
    access: AccessLayer,
    inner: S,
}

impl<S> Service<Request<Body>> for AccessService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, std::result::Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let access = self.access.clone();
        // The clone takes the place of the service that was polled ready (tower's `Service::call`).
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            let Some(admission) = access.rules.admission(request.uri().path()) else {
                return Ok(status::unknown_method().into_http());
            };
            let peer = request.extensions().get().cloned().unwrap_or_default();
            match access.admit(admission, request.headers(), &peer).await {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err(error) => Ok(Status::from(error).into_http()),
            }
        })
    }
}

/// As much of `google/protobuf/descriptor.proto` as names an RPC, with our option in it: the
/// generated types drop options they do not know.
mod descriptor {
    use crate::proto::tollkeeper::access::v1::Rule;

    #[derive(prost::Message)]
    pub(super) struct FileSet {
        #[prost(message, repeated, tag = "1")]
        pub(super) file: Vec<File>,
    }

    #[derive(prost::Message)]
    pub(super) struct File {
        #[prost(string, tag = "2")]
        pub(super) package: String,
        #[prost(message, repeated, tag = "6")]
        pub(super) service: Vec<Service>,
    }

    #[derive(prost::Message)]
    pub(super) struct Service {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, repeated, tag = "2")]
        pub(super) method: Vec<Method>,
    }

    #[derive(prost::Message)]
    pub(super) struct Method {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(message, optional, tag = "4")]
        pub(super) options: Option<MethodOptions>,
    }

    #[derive(prost::Message)]
    pub(super) struct MethodOptions {
        #[prost(message, optional, tag = "50611")]
        pub(super) rule: Option<Rule>,
    }
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
