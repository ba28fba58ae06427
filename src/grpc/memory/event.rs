//! `RecordUsage` on the short way: what waits for the ledger and for nothing else.

use std::{sync::Arc, time::Instant};

use http::{Request, Response, request::Parts};
use prost::Message as _;
use tonic::{Code, body::Body};
use tower::Service;

use super::{
    super::{
        call::Ended,
        convert::{self, only},
        metrics::RpcMetrics,
    },
    MemoryLayer, Moment, Shared, framed, message_of, respond,
};
use crate::{
    model::UsageEvent,
    proto::tollkeeper::usage::v1::{RecordUsageRequest, RecordUsageResponse},
};

/// A call with an event of a known user, from a caller who may book it.
pub(super) struct EventCall {
    pub(super) event: UsageEvent,
    pub(super) head: Parts,
    pub(super) arrived: Instant,
    pub(super) metrics: Arc<RpcMetrics>,
}

impl MemoryLayer {
    /// The event of a call, if all is well with it and memory knows whose it is.
    pub(super) fn event(&self, call: &[u8], moment: Moment) -> Option<UsageEvent> {
        let request = RecordUsageRequest::decode(message_of(call)?).ok()?;
        let event = request.event?;
        let event = only(|fields| convert::usage_event(fields, "", event, moment.now)).ok()?;
        self.auth.recall_user(event.user_id, moment.clock)?;
        Some(event)
    }
}

impl EventCall {
    /// Books the event. How else the call ends is told the long way.
    pub(super) async fn booked<S>(
        self: Box<Self>,
        shared: Arc<Shared<S>>,
    ) -> Result<Response<Body>, S::Error>
    where
        S: Service<Request<Body>, Response = Response<Body>> + Clone,
    {
        let layer = &shared.layer;
        let deadline = layer.end.deadline(&self.head.headers, self.arrived);
        let recording = layer.usage.record(self.event);
        let recorded = layer.end.wait_for(recording, deadline).await;
        let ended = match recorded.map(|recorded| recorded.map_err(Ended::failed)) {
            Ok(Ok(recorded)) => {
                let answer = framed(&RecordUsageResponse::from(recorded));
                let response = respond(&self.head.headers, answer);
                self.metrics.record(Code::Ok, self.arrived.elapsed());
                return Ok(response);
            }
            Ok(Err(ended)) | Err(ended) => ended,
        };
        let mut request = Request::from_parts(self.head, Body::empty());
        request.extensions_mut().insert(ended);
        Box::pin(shared.pass(request, self.arrived)).await
    }
}
