//! `RecordUsage` on the short way: what waits for the ledger and for nothing else.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use prost::Message as _;
use tokio::time::sleep_until;
use tonic::{Code, body::Body};
use tower::Service;

use super::{
    super::{
        convert::{self, only},
        metrics::RpcMetrics,
    },
    MemoryLayer, Moment, Shared, Unread, framed, message_of, respond,
};
use crate::{
    error::Error,
    model::UsageEvent,
    proto::tollkeeper::usage::v1::{RecordUsageRequest, RecordUsageResponse},
};

/// An event to book, of a known user, from a caller who may.
pub(super) struct Recording {
    pub(super) event: UsageEvent,
    /// As it came.
    pub(super) request: Request<Bytes>,
    pub(super) arrived: Instant,
    pub(super) metrics: Arc<RpcMetrics>,
}

/// Why an event was not booked, for the long way to tell.
#[derive(Clone)]
struct Refused(Arc<Error>);

impl MemoryLayer {
    /// The event of a call, if all is well with it and memory knows whose it is.
    pub(super) fn event(&self, call: &Bytes, moment: Moment) -> Option<UsageEvent> {
        let request = RecordUsageRequest::decode(message_of(call)?).ok()?;
        let event = request.event?;
        let event = only(|fields| convert::usage_event(fields, "", event, moment.now)).ok()?;
        self.auth.recall_user(event.user_id, moment.clock)?;
        Some(event)
    }
}

impl Recording {
    /// Books the event. The long way tells of anything else than that it is booked.
    pub(super) async fn recorded<S>(
        self,
        shared: Arc<Shared<S>>,
    ) -> Result<Response<Body>, S::Error>
    where
        S: Service<Request<Body>, Response = Response<Body>> + Clone,
    {
        let end = &shared.layer.end;
        let deadline = end.deadline(self.request.headers(), self.arrived);
        let recorded = tokio::select! {
            biased;
            recorded = shared.layer.usage.record(self.event) => Some(recorded),
            () = sleep_until(deadline.into()) => None,
            () = end.cut() => None,
        };
        if let Some(Ok(recorded)) = recorded {
            let answer = framed(&RecordUsageResponse::from(recorded));
            let response = respond(self.request.headers(), answer);
            self.metrics.record(Code::Ok, self.arrived.elapsed());
            return Ok(response);
        }
        let mut request = self.request.map(|call| {
            Body::new(Unread {
                frame: Some(Frame::data(call)),
                rest: Body::empty(),
            })
        });
        if let Some(Err(error)) = recorded {
            request.extensions_mut().insert(Refused(Arc::new(error)));
        }
        Box::pin(shared.pass(request, self.arrived)).await
    }
}

/// Why the event of this request was not booked, if that was tried before.
pub(in crate::grpc) fn refusal<T>(request: &mut tonic::Request<T>) -> Option<Error> {
    let Refused(error) = request.extensions_mut().remove()?;
    // Nobody else has it; if somebody had, the event would be tried once more.
    Arc::into_inner(error)
}
