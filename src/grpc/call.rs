//! What every call gets: a request id, a deadline, a log line, an explained error, and protection
//! of the others from its panic.

use std::{
    net::IpAddr,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{
    HeaderMap, Request, Response,
    header::{CONTENT_TYPE, USER_AGENT},
};
use tokio::{sync::watch, time::sleep_until};
use tonic::{Code, Status, body::Body};
use tonic_types::StatusExt as _;
use tower::{Layer, Service};
use tracing::Instrument as _;

use super::{
    access::Caller,
    metrics::CallMetrics,
    peer::Peer,
    proxies::TrustedProxies,
    request_id::{self, REQUEST_ID},
    status,
};
use crate::{
    auth::Principal,
    error::Error,
    model::{Actor, Origin},
};

/// When a call came, of one that another layer has looked at since.
#[derive(Clone, Copy)]
pub(super) struct Arrived(pub(super) Instant);

/// Methods called once per request of somebody else's traffic, or by tools: their successes are no
/// news.
const HOT_METHODS: [&str; 12] = [
    "BatchRecordUsage",
    "BatchValidateTokens",
    "Check",
    "CheckQuota",
    "CommitReservation",
    "ExtendReservation",
    "RecordUsage",
    "ReleaseReservation",
    "ReserveQuota",
    "ServerReflectionInfo",
    "ShouldRateLimit",
    "ValidateToken",
];

/// Where a call came from; in the extensions of every request.
#[derive(Clone, Debug)]
struct CallContext {
    request_id: String,
    address: Option<IpAddr>,
    user_agent: String,
}

/// Who calls, from where, for the audit trail.
pub(super) fn origin_of<T>(request: &tonic::Request<T>) -> Origin {
    let actor = match Caller::of(request) {
        Ok(Principal::User(user)) => Actor::User(user.id),
        Ok(Principal::Service { id, .. }) => Actor::Service(*id),
        // Nothing that certificates open is written down: administration needs a key.
        Ok(Principal::Peer { .. }) | Err(_) => Actor::Anonymous,
    };
    let context = request.extensions().get::<CallContext>().cloned();
    Origin {
        actor,
        request_id: context
            .as_ref()
            .map(|c| c.request_id.clone())
            .unwrap_or_default(),
        address: context.as_ref().and_then(|c| c.address),
        user_agent: context.map(|c| c.user_agent).unwrap_or_default(),
    }
}

/// When a call is not waited for any longer.
#[derive(Clone)]
pub struct CallEnd {
    max_deadline: Duration,
    cut: watch::Receiver<bool>,
}

impl CallEnd {
    /// By its deadline, and once `cut` turns true, on the way down.
    pub fn new(max_deadline: Duration, cut: watch::Receiver<bool>) -> Self {
        Self { max_deadline, cut }
    }

    /// Of a call with these headers. Counted from its arrival, as the transport does: a busy machine may
    /// poll the call much later.
    pub(super) fn deadline(&self, headers: &HeaderMap, arrived: Instant) -> Instant {
        arrived + deadline(headers, self.max_deadline)
    }

    /// Waits for `work`, but not past `deadline`.
    ///
    /// # Errors
    /// How the call ended instead. What `work` has begun may go on.
    pub(super) async fn wait_for<T>(
        &self,
        work: impl Future<Output = T>,
        deadline: Instant,
    ) -> Result<T, Ended> {
        // A timer needs a tick, even for a time that has passed.
        if deadline <= Instant::now() {
            return Err(Ended::DeadlineExceeded);
        }
        let mut cut = self.cut.clone();
        tokio::select! {
            biased;
            done = AssertUnwindSafe(work).catch_unwind() => done.map_err(|_| Ended::Panicked),
            () = sleep_until(deadline.into()) => Err(Ended::DeadlineExceeded),
            // An error means that nobody can cut any more.
            Ok(_) = cut.wait_for(|cut| *cut) => Err(Ended::Cut),
        }
    }
}

/// How a call ended without an answer. In the extensions of a request that another layer has waited for,
/// to be told.
#[derive(Clone, Debug)]
pub(super) enum Ended {
    DeadlineExceeded,
    Cut,
    Panicked,
    /// In a place of its own, since extensions want to be copied; nobody copies them.
    Failed(Arc<Error>),
}

impl Ended {
    pub(super) fn failed(error: Error) -> Self {
        Self::Failed(Arc::new(error))
    }
}

impl From<Ended> for Status {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::DeadlineExceeded => status::deadline_exceeded(),
            Ended::Cut => status::shutting_down(),
            Ended::Panicked => {
                tracing::error!("the handler panicked");
                status::panicked()
            }
            Ended::Failed(error) => Arc::into_inner(error)
                .unwrap_or_else(|| Error::internal("an error is told twice"))
                .into(),
        }
    }
}

/// See the module.
#[derive(Clone)]
pub struct CallLayer {
    metrics: CallMetrics,
    proxies: TrustedProxies,
    end: CallEnd,
}

impl CallLayer {
    /// Calls that are cut short are answered `SHUTTING_DOWN`.
    pub fn new(metrics: CallMetrics, proxies: TrustedProxies, end: CallEnd) -> Self {
        Self {
            metrics,
            proxies,
            end,
        }
    }
}

impl<S> Layer<S> for CallLayer {
    type Service = CallService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CallService {
            layer: self.clone(),
            inner,
        }
    }
}

/// See [`CallLayer`].
#[derive(Clone)]
pub struct CallService<S> {
    layer: CallLayer,
    inner: S,
}

impl<S> Service<Request<Body>> for CallService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Send,
    S::Future: Send + 'static,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let arrived = request.extensions_mut().remove::<Arrived>();
        let started = arrived.map_or_else(Instant::now, |Arrived(at)| at);
        let metrics = self.layer.metrics.of(request.uri().path()).clone();
        let method = request.uri().path().trim_start_matches('/').to_owned();
        let id = request_id::of(request.headers());
        let context = CallContext {
            request_id: id.to_str().unwrap_or_default().to_owned(),
            address: request
                .extensions()
                .get::<Peer>()
                .and_then(|peer| peer.address)
                .map(|peer| self.layer.proxies.client(peer.ip(), request.headers())),
            user_agent: user_agent(request.headers()),
        };
        let request_id = context.request_id.clone();
        let span = tracing::info_span!("call", method, request_id);
        request.extensions_mut().insert(context);
        let end = self.layer.end.clone();
        let deadline = end.deadline(request.headers(), started);
        let ended = request.extensions_mut().remove::<Ended>();
        let is_new = ended.is_none() && is_grpc(request.headers());
        let handled = is_new.then(|| self.inner.call(request));
        let call = async move {
            let handled = match (handled, ended) {
                (Some(handled), _) => end.wait_for(handled, deadline).await,
                (None, Some(ended)) => Err(ended),
                (None, None) => Ok(Ok(status::not_grpc())),
            };
            let mut response = match handled {
                Ok(response) => response?,
                Err(ended) => Status::from(ended).into_http(),
            };
            let (code, reason) = explain(&mut response, &request_id);
            response.headers_mut().insert(REQUEST_ID, id);
            let took = started.elapsed();
            metrics.record(code, took);
            log(&method, code, &reason, took);
            Ok(response)
        };
        Box::pin(call.instrument(span))
    }
}

/// Whether a request speaks gRPC (gRPC over HTTP/2, `Content-Type`); the transport does not look.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE);
    value.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

fn user_agent(headers: &HeaderMap) -> String {
    let value = headers
        .get(USER_AGENT)
        .and_then(|value| value.to_str().ok());
    value.unwrap_or_default().chars().take(256).collect()
}

/// The client's deadline (gRPC over HTTP/2, `grpc-timeout`) or the longest one, whichever is sooner.
pub(super) fn deadline(headers: &HeaderMap, max: Duration) -> Duration {
    let parse = |text: &str| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let value: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
        match unit {
            "H" => Some(Duration::from_hours(value)),
            "M" => Some(Duration::from_mins(value)),
            "S" => Some(Duration::from_secs(value)),
            "m" => Some(Duration::from_millis(value)),
            "u" => Some(Duration::from_micros(value)),
            "n" => Some(Duration::from_nanos(value)),
            _ => None,
        }
    };
    let asked = headers
        .get("grpc-timeout")
        .and_then(|value| value.to_str().ok())
        .and_then(parse);
    asked.map_or(max, |asked| asked.min(max))
}

/// The code of an answer, and the reason of an error. An error of the transport is given its details, every
/// error the id.
///
/// Sees answers that are errors from the start, which are all but those of streams under way.
fn explain(response: &mut Response<Body>, request_id: &str) -> (Code, String) {
    let error = Status::from_header_map(response.headers());
    let Some(mut error) = error.filter(|error| error.code() != Code::Ok) else {
        return (Code::Ok, String::new());
    };
    if error.details().is_empty() {
        error = status::explain(&error);
    }
    let http_status = response.status();
    *response = status::with_request_id(&error, request_id).into_http();
    *response.status_mut() = http_status;
    let info = error.get_details_error_info();
    (
        error.code(),
        info.map(|info| info.reason).unwrap_or_default(),
    )
}

/// One line a call. A client's mistake is the client's business; ours is an error where it arose.
fn log(method: &str, code: Code, reason: &str, took: Duration) {
    // Whole microseconds, for few digits.
    let duration_ms = took.as_micros() as f64 / 1000.0;
    let name = method.rsplit('/').next().unwrap_or_default();
    if code == Code::Ok && HOT_METHODS.contains(&name) {
        tracing::debug!(?code, duration_ms, "call finished");
    } else if code == Code::Ok {
        tracing::info!(?code, duration_ms, "call finished");
    } else {
        tracing::info!(?code, reason, duration_ms, "call finished");
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_str(value).expect("ASCII"),
        )])
    }

    #[test]
    fn the_sooner_deadline_holds() {
        let max = Duration::from_secs(30);
        let with = |text| deadline(&headers("grpc-timeout", text), max);
        assert_eq!(with("250m"), Duration::from_millis(250));
        assert_eq!(with("5S"), Duration::from_secs(5));
        assert_eq!(with("1n"), Duration::from_nanos(1));
        assert_eq!(with("1H"), max);
        for bad in ["", "S", "5", "5X", "-5S", "123456789S"] {
            assert_eq!(with(bad), max, "{bad}");
        }
    }
}
