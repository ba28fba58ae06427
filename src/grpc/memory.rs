//! The short way: what memory alone can answer is answered before the machinery for calls that wait.
//!
//! Internal services ask `ValidateToken`, and gateways `ReserveQuota`, `CheckQuota` or what Envoy asks,
//! for every request of their own, so those calls have a way of their own through the server: no task,
//! no timer. `RecordUsage` comes as often: of a user whom memory knows it waits for the ledger, and for
//! nothing else. This way knows good news only. Whatever is not at once a known caller, a whole plain message
//! and something that memory says yes to goes on to the other layers as if it had not been looked at;
//! they decide, refuse, explain and log.

mod body;
mod event;

use std::{
    cell::RefCell,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use http::{
    HeaderMap, HeaderValue, Request, Response,
    header::{AUTHORIZATION, CONTENT_TYPE},
    request::Parts,
};
use http_body::{Body as _, Frame};
use prost::Message;
use tonic::{Code, body::Body};
use tower::{Layer, Service, ServiceExt as _, util::Oneshot};
use tracing::Level;

use super::{
    access::Rules,
    bearer::bearer,
    call::{Arrived, CallEnd, is_grpc},
    convert::only,
    envoy,
    metrics::{CallMetrics, RpcMetrics},
    peer::Peer,
    quota,
    request_id::{self, REQUEST_ID},
    reservation,
    wire::{self, Writer},
};
use crate::{
    auth::{Auth, KnownService, Validated},
    clock::BootTime,
    model::{Scope, UserId},
    proto::tollkeeper::auth::v1::ValidateTokenResponse,
    usage::Usage,
};
use body::{Answer, Unread};
use event::EventCall;

/// What precedes a message: whether it is compressed, and its length (gRPC over HTTP/2,
/// `Length-Prefixed-Message`).
const PREFIX_BYTES: usize = 5;

/// See the module.
#[derive(Clone)]
pub struct MemoryLayer {
    auth: Auth,
    usage: Usage,
    ways: Arc<[Way]>,
    max_request_bytes: usize,
    end: CallEnd,
    peer: Peer,
}

/// An RPC that memory may answer.
struct Way {
    path: &'static str,
    /// By which services may call.
    scope: Option<Scope>,
    metrics: Arc<RpcMetrics>,
    answer: Answering,
}

#[derive(Clone, Copy)]
enum Answering {
    AtOnce(fn(&MemoryLayer, &Bytes, Moment) -> Option<Bytes>),
    /// Once the event that is in the call is booked.
    Booked,
}

/// When a call came.
#[derive(Clone, Copy)]
struct Moment {
    now: DateTime<Utc>,
    clock: BootTime,
}

impl Moment {
    fn now() -> Self {
        Self {
            now: Utc::now(),
            clock: BootTime::now(),
        }
    }

    /// By the clock of those who wait.
    fn arrived(self) -> Instant {
        let now = Instant::now();
        now.checked_sub(self.clock.elapsed()).unwrap_or(now)
    }
}

impl MemoryLayer {
    /// Larger requests go the long way. Calls that wait do so until `end`.
    pub fn new(
        auth: Auth,
        usage: Usage,
        rules: &Rules,
        metrics: &CallMetrics,
        max_request_bytes: usize,
        end: CallEnd,
    ) -> Self {
        use Answering::{AtOnce, Booked};
        let way = |(path, answer)| Way {
            path,
            scope: rules.service_scope(path),
            metrics: metrics.of(path).clone(),
            answer,
        };
        let ways = [
            (
                "/tollkeeper.auth.v1.AuthService/ValidateToken",
                AtOnce(Self::validate_token),
            ),
            (
                "/tollkeeper.usage.v1.UsageService/ReserveQuota",
                AtOnce(Self::reserve_quota),
            ),
            (
                "/tollkeeper.usage.v1.UsageService/CheckQuota",
                AtOnce(Self::check_quota),
            ),
            (
                "/envoy.service.auth.v3.Authorization/Check",
                AtOnce(Self::check),
            ),
            (
                "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
                AtOnce(Self::should_rate_limit),
            ),
            ("/tollkeeper.usage.v1.UsageService/RecordUsage", Booked),
        ];
        Self {
            auth,
            usage,
            ways: ways.map(way).into(),
            max_request_bytes,
            end,
            peer: Peer::default(),
        }
    }

    /// Whether a message is within the bounds of the long way.
    fn admits(&self, call: &[u8]) -> bool {
        call.len() <= PREFIX_BYTES + self.max_request_bytes
    }

    /// For the calls of one connection.
    #[must_use]
    pub fn of(&self, peer: Peer) -> Self {
        Self {
            peer,
            ..self.clone()
        }
    }

    fn validate_token(&self, call: &Bytes, Moment { now, clock }: Moment) -> Option<Bytes> {
        let validated = self.auth.recall(token_of(call)?, now, clock)?;
        let encode = |validated: &Validated| framed(&ValidateTokenResponse::from(validated));
        Some(validated.encoded(encode).clone())
    }

    fn reserve_quota(&self, call: &Bytes, Moment { clock, .. }: Moment) -> Option<Bytes> {
        let asked = reservation::Asked::read(message_of(call)?)?;
        let (user_id, wish) = only(|fields| reservation::request(fields, &asked)).ok()?;
        let user = self.auth.recall_user(user_id, clock)?;
        let reserved = self.usage.reserve_at_once(&user, wish, clock.into())?;
        Some(written(|out| reservation::write(&reserved, out)))
    }

    fn check_quota(&self, call: &Bytes, Moment { clock, .. }: Moment) -> Option<Bytes> {
        let asked = quota::Asked::read(message_of(call)?)?;
        let (user_id, wish) = only(|fields| quota::check(fields, &asked)).ok()?;
        let user = self.auth.recall_user(user_id, clock)?;
        let (decision, quota) = self.usage.check_quota_at_once(&user, &wish, clock.into())?;
        Some(written(|out| {
            quota::write_checked(decision, quota.as_ref(), out);
        }))
    }

    fn check(&self, call: &Bytes, Moment { now, clock }: Moment) -> Option<Bytes> {
        let message = message_of(call)?;
        let answer = envoy::check_at_once(&self.auth, &self.usage, message, now, clock)?;
        Some(framed(&answer))
    }

    fn should_rate_limit(&self, call: &Bytes, Moment { now, clock }: Moment) -> Option<Bytes> {
        let (auth, usage) = (&self.auth, &self.usage);
        let message = message_of(call)?;
        let answer = envoy::should_rate_limit_at_once(auth, usage, message, now, clock)?;
        Some(framed(&answer))
    }
}

impl<S> Layer<S> for MemoryLayer {
    type Service = MemoryService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        MemoryService(Arc::new(Shared {
            layer: self.clone(),
            caller: Mutex::default(),
            inner,
        }))
    }
}

/// See [`MemoryLayer`]. Cloned for every call, so one pointer.
pub struct MemoryService<S>(Arc<Shared<S>>);

struct Shared<S> {
    layer: MemoryLayer,
    /// Who called last, by the header that said so: seldom another one calls next.
    caller: Mutex<Option<(HeaderValue, KnownService)>>,
    inner: S,
}

impl<S> Clone for MemoryService<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Service<Request<Body>> for MemoryService<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + Sync + 'static,
    S::Future: Send + Unpin,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = MemoryFuture<S>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // A call that goes on waits for the inner service then.
        Poll::Ready(Ok(()))
    }

    /// Reads the call. It is answered when the future is looked at first: of calls that came together,
    /// after all of them were read. The users that quota is asked for are on their way from memory by then.
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        MemoryFuture {
            asked: Some((self.0.clone(), self.0.read(request), Moment::now())),
            waiting: None,
        }
    }
}

/// A call under way.
pub struct MemoryFuture<S: Service<Request<Body>>> {
    asked: Option<(Arc<Shared<S>>, Read, Moment)>,
    /// What is not answered at once, apart from it: most calls are moved about, and end.
    waiting: Option<BoxFuture<'static, Result<Response<Body>, S::Error>>>,
}

impl<S> Future for MemoryFuture<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + Sync + 'static,
    S::Future: Send + Unpin,
{
    type Output = Result<Response<Body>, S::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some((shared, read, moment)) = self.asked.take() {
            self.waiting = Some(match shared.look(read, moment) {
                Look::Answered(response) => return Poll::Ready(Ok(response)),
                Look::Waits(call) => Box::pin(call.booked(shared)),
                Look::Passes(request) => Box::pin(shared.pass(request, moment.arrived())),
            });
        }
        let waiting = self.waiting.as_mut().expect("polled until it is answered");
        waiting.as_mut().poll(cx)
    }
}

/// A call as it came.
enum Read {
    Whole(Whole),
    /// Not here for a way of the short way, or not with its message.
    Other(Request<Body>),
}

/// A call on one of the ways, with its whole message.
struct Whole {
    way: usize,
    head: Parts,
    call: Bytes,
    rest: Body,
}

impl Whole {
    /// As if it had not been looked at.
    fn unread(self) -> Request<Body> {
        unread(self.head, Frame::data(self.call), self.rest)
    }
}

fn unread(head: Parts, frame: Frame<Bytes>, rest: Body) -> Request<Body> {
    let frame = Some(frame);
    Request::from_parts(head, Body::new(Unread { frame, rest }))
}

/// What memory makes of a call.
enum Look {
    Answered(Response<Body>),
    Waits(Box<EventCall>),
    /// As it came.
    Passes(Request<Body>),
}

impl<S> Shared<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone,
{
    /// The long way.
    fn pass(&self, mut request: Request<Body>, arrived: Instant) -> Oneshot<S, Request<Body>> {
        let extensions = request.extensions_mut();
        extensions.insert(Arrived(arrived));
        extensions.insert(self.layer.peer.clone());
        self.inner.clone().oneshot(request)
    }
}

impl<S> Shared<S> {
    fn read(&self, request: Request<Body>) -> Read {
        let path = request.uri().path();
        let way = self.layer.ways.iter().position(|way| way.path == path);
        // Where successes are logged, they take the way that logs.
        let Some(way) = way.filter(|_| !tracing::enabled!(Level::DEBUG)) else {
            return Read::Other(request);
        };
        if !is_grpc(request.headers()) {
            return Read::Other(request);
        }
        let (head, mut rest) = request.into_parts();
        // The message came with the headers or it does not matter here: nothing waits for it.
        let mut nobody = Context::from_waker(Waker::noop());
        let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut rest).poll_frame(&mut nobody) else {
            return Read::Other(Request::from_parts(head, rest));
        };
        match frame.into_data() {
            Ok(call) if rest.is_end_stream() && self.layer.admits(&call) => {
                if let Some(user_id) = user_of(&call) {
                    self.layer.auth.prefetch_user(user_id);
                    self.layer.usage.prefetch(user_id);
                }
                Read::Whole(Whole {
                    way,
                    head,
                    call,
                    rest,
                })
            }
            Ok(part) => Read::Other(unread(head, Frame::data(part), rest)),
            Err(trailers) => Read::Other(unread(head, trailers, rest)),
        }
    }

    fn look(&self, read: Read, moment: Moment) -> Look {
        let whole = match read {
            Read::Whole(whole) => whole,
            Read::Other(request) => return Look::Passes(request),
        };
        let way = &self.layer.ways[whole.way];
        if !self.may_call(way, &whole.head.headers, moment) {
            return Look::Passes(whole.unread());
        }
        match way.answer {
            Answering::AtOnce(answer) => {
                if let Some(answer) = answer(&self.layer, &whole.call, moment) {
                    let response = respond(&whole.head.headers, answer);
                    way.metrics.record(Code::Ok, moment.clock.elapsed());
                    return Look::Answered(response);
                }
            }
            Answering::Booked => {
                if let Some(event) = self.layer.event(&whole.call, moment) {
                    return Look::Waits(Box::new(EventCall {
                        event,
                        head: whole.head,
                        arrived: moment.arrived(),
                        metrics: way.metrics.clone(),
                    }));
                }
            }
        }
        Look::Passes(whole.unread())
    }

    fn may_call(&self, way: &Way, headers: &HeaderMap, moment: Moment) -> bool {
        let Some(header) = headers.get(AUTHORIZATION) else {
            let scopes = self.layer.peer.scopes.as_ref();
            return scopes
                .zip(way.scope)
                .is_some_and(|(scopes, scope)| scopes.contains(scope));
        };
        let auth = &self.layer.auth;
        let Moment { now, clock } = moment;
        let admits = |known: &_| {
            let scope = way.scope;
            scope.is_some_and(|scope| auth.still_admits(known, scope, now, clock))
        };
        // One thread looks at a connection's calls, so nobody else has the lock.
        let mut caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((called_with, known)) = &*caller
            && called_with == header
            // Two are refused.
            && headers.get_all(AUTHORIZATION).iter().nth(1).is_none()
            && admits(known)
        {
            return true;
        }
        let Ok(key) = bearer(headers) else {
            return false;
        };
        let known = auth.recall_service(key).filter(admits);
        *caller = known.map(|known| (header.clone(), known));
        caller.is_some()
    }
}

/// The token of a `ValidateTokenRequest` that holds nothing else, from the bytes of a call.
pub(super) fn token_of(data: &[u8]) -> Option<&str> {
    let mut token = None;
    wire::read(message_of(data)?, |number, value| match number {
        1 => wire::once(&mut token, value.text()),
        _ => None,
    })?;
    token
}

/// Whose call it is, if its message begins with the user: its first field is a text of 36 bytes.
fn user_of(call: &[u8]) -> Option<UserId> {
    let text = call.get(PREFIX_BYTES..)?.strip_prefix(b"\x0a\x24")?;
    std::str::from_utf8(text.get(..36)?).ok()?.parse().ok()
}

/// The message of a call that is whole and plain, from its bytes.
fn message_of(data: &[u8]) -> Option<&[u8]> {
    let (prefix, message) = data.split_at_checked(PREFIX_BYTES)?;
    let len = u32::try_from(message.len()).ok()?.to_be_bytes();
    (prefix == [0, len[0], len[1], len[2], len[3]]).then_some(message)
}

fn respond(headers: &HeaderMap, message: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::new(Answer::Message(message)));
    let headers_out = response.headers_mut();
    headers_out.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers_out.insert(REQUEST_ID, request_id::of(headers));
    response
}

/// The answer as it goes over the wire, its prefix included.
fn framed(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + len);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(len).expect("a short message"));
    message.encode(&mut bytes).expect("it has room");
    bytes.freeze()
}

/// As [`framed`], of a message that is written in place.
fn written(write: impl FnOnce(&mut Writer<'_>)) -> Bytes {
    thread_local! {
        /// Room that is used again.
        static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    ROOM.with_borrow_mut(|room| {
        room.clear();
        room.extend([0; PREFIX_BYTES]);
        write(&mut Writer::new(room));
        let len = u32::try_from(room.len() - PREFIX_BYTES).expect("a short message");
        room[1..PREFIX_BYTES].copy_from_slice(&len.to_be_bytes());
        Bytes::copy_from_slice(room)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::tollkeeper::{
        auth::v1::ValidateTokenRequest,
        usage::v1::{CheckQuotaRequest, ReserveQuotaRequest},
    };

    fn request(token: &str, include_quota: bool) -> ValidateTokenRequest {
        ValidateTokenRequest {
            token: token.to_owned(),
            include_quota,
            ..ValidateTokenRequest::default()
        }
    }

    #[test]
    fn a_message_that_is_a_token_and_nothing_else_is_read() {
        for token in [
            "x",
            "ä",
            &"y".repeat(127),
            &"z".repeat(128),
            &"z".repeat(20_000),
        ] {
            assert_eq!(token_of(&framed(&request(token, false))), Some(token));
        }
    }

    #[test]
    fn whose_quota_is_asked_for_is_known_before_the_message_is_read() {
        let user_id = UserId::new();
        let name = user_id.0.to_string();
        let check = CheckQuotaRequest {
            user_id: name.clone(),
            tokens: 7,
            ..CheckQuotaRequest::default()
        };
        let reserve = ReserveQuotaRequest {
            user_id: name.to_uppercase(),
            request_id: "request".to_owned(),
            ..ReserveQuotaRequest::default()
        };
        for call in [framed(&check), framed(&reserve)] {
            assert_eq!(user_of(&call), Some(user_id));
            for end in 0..PREFIX_BYTES + 38 {
                assert_eq!(user_of(&call[..end]), None, "{end}");
            }
        }
        let token = framed(&request("token", false));
        assert_eq!(user_of(&token), None);
    }

    #[test]
    fn any_other_message_is_left_to_the_long_way() {
        let good = framed(&request("token", false)).to_vec();
        assert_eq!(token_of(&framed(&request("", false))), None);
        assert_eq!(token_of(&framed(&request("token", true))), None);
        for end in 0..good.len() {
            assert_eq!(token_of(&good[..end]), None, "{end}");
        }
        assert_eq!(token_of(&[&good[..], b"x"].concat()), None);
        // Compressed; another field; another type; not UTF-8; a length beyond the message.
        for (index, byte) in [(0, 1), (5, 0x12), (5, 0x08), (7, 0xff), (6, 0x7f)] {
            let mut bad = good.clone();
            bad[index] = byte;
            assert_eq!(token_of(&bad), None, "{index}");
        }
    }
}
