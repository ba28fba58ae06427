//! Many events at once: what `BatchRecordUsage` and `StreamUsage` share, and the stream.

use std::{
    collections::HashSet,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use chrono::Utc;
use futures_util::{
    FutureExt as _, Stream, StreamExt as _, TryStreamExt as _,
    stream::{self, FuturesOrdered},
};
use tokio::{sync::watch, task::JoinHandle};
use tonic::{Status, Streaming};

use super::{
    access::Shown,
    convert::{self, only},
    status,
};
use crate::{
    auth::Auth,
    clock::BootTime,
    error::{Error, Result},
    model::{UserId, Violation},
    proto::tollkeeper::usage::v1::{
        StreamFailure, StreamUsageRequest, StreamUsageResponse, UsageEvent,
    },
    usage::{Recorded, Usage, WhenFull},
};

/// Events of one call or one message of a stream.
const BATCH_EVENTS: usize = 1000;

/// Users of a batch that are read from the database at once: a part of the pool.
const BATCH_READS: usize = 4;

/// Batches of a stream that are on their way; the next is read when the first has been settled.
const WINDOW: usize = 16;

/// Offsets leave room for what may still come.
const MAX_OFFSET: i64 = 1 << 62;

pub(super) type Acknowledgements =
    Pin<Box<dyn Stream<Item = Result<StreamUsageResponse, Status>> + Send>>;

/// A batch within its bounds.
pub(super) fn batch(events: Vec<UsageEvent>) -> Result<Vec<UsageEvent>, Violation> {
    if (1..=BATCH_EVENTS).contains(&events.len()) {
        Ok(events)
    } else {
        Err(format!("must hold 1 to {BATCH_EVENTS} events").into())
    }
}

/// Books events, each for itself; says what became of each, in their order.
///
/// # Errors
/// `Overloaded`: nothing was done · `Unavailable`: some may be booked, repeat all. Those of an
/// event are in its place: `Invalid` · `UserNotFound` · `EventConflict` · `Internal`
pub(super) async fn record(
    auth: &Auth,
    usage: &Usage,
    events: Vec<UsageEvent>,
    when_full: WhenFull,
) -> Result<Vec<Result<Recorded>>> {
    let now = Utc::now();
    let read = |event| only(|fields| convert::usage_event(fields, "", event, now));
    let events: Vec<_> = events.into_iter().map(read).collect();
    let named = events.iter().flatten().map(|event| event.user_id);
    let missing = missing_users(auth, named).await?;
    let mut accepted = Vec::new();
    // What is refused already, and gaps for what is not.
    let refused: Vec<Option<Error>> = events
        .into_iter()
        .map(|event| match event {
            Ok(event) if missing.contains(&event.user_id) => Some(Error::UserNotFound),
            Ok(event) => {
                accepted.push(event);
                None
            }
            Err(error) => Some(error),
        })
        .collect();
    let mut recorded = usage.record_all(accepted, when_full).await?.into_iter();
    let missing = || Err(Error::internal("an event was left out"));
    Ok(refused
        .into_iter()
        .map(|refused| match refused {
            Some(error) => Err(error),
            None => recorded.next().unwrap_or_else(missing),
        })
        .collect())
}

/// Which of the users there are not. Most are known from memory, which is asked first.
async fn missing_users(
    auth: &Auth,
    named: impl Iterator<Item = UserId>,
) -> Result<HashSet<UserId>> {
    let clock = BootTime::now();
    let unsure = named.filter(|id| auth.recall_user(*id, clock).is_none());
    let unsure: HashSet<UserId> = unsure.collect();
    let standings = unsure.into_iter().map(|id| async move {
        match auth.user_standing(id).await {
            Ok(_) => Ok(None),
            Err(Error::UserNotFound) => Ok(Some(id)),
            Err(error) => Err(error),
        }
    });
    let standings = stream::iter(standings).buffer_unordered(BATCH_READS);
    standings
        .try_filter_map(async |id| Ok(id))
        .try_collect()
        .await
}

/// Books what a stream brings and acknowledges it, for the caller who has `shown` this.
pub(super) fn acknowledge(
    auth: Auth,
    usage: Usage,
    shown: Shown,
    requests: Streaming<StreamUsageRequest>,
) -> Acknowledgements {
    let session = Session {
        closing: usage.closing(),
        auth,
        usage,
        shown,
        requests,
        next_offset: None,
        under_way: FuturesOrdered::new(),
        end: None,
    };
    Box::pin(stream::unfold(session, |mut session| async {
        let next = session.next().await?;
        Some((next, session))
    }))
}

/// A stream under way.
struct Session {
    auth: Auth,
    usage: Usage,
    shown: Shown,
    requests: Streaming<StreamUsageRequest>,
    closing: watch::Receiver<bool>,
    /// Where the next batch must begin.
    next_offset: Option<i64>,
    /// In the order of their offsets. Tasks: what a client that reads no more has under way must not
    /// stand still with what others wait for.
    under_way: FuturesOrdered<Task>,
    /// Nothing more is read; how the stream ends once all that was read is settled.
    end: Option<End>,
}

enum End {
    Done,
    Failed(Status),
    /// Has been told.
    Told,
}

/// What a stream waits for.
enum Step {
    Settled(Result<Settled>),
    Closing,
    Request(Result<Option<StreamUsageRequest>, Status>),
    /// All is read and settled.
    Nothing,
}

/// What became of a batch.
struct Settled {
    first: i64,
    recorded: Vec<Result<Recorded>>,
}

impl Session {
    /// The next message to the client; `None` at the end.
    async fn next(&mut self) -> Option<Result<StreamUsageResponse, Status>> {
        loop {
            match self.step().await {
                Step::Settled(settled) => match settled.and_then(|settled| self.answer(settled)) {
                    Ok(answer) => return Some(Ok(answer)),
                    // What follows is not acknowledged: the client sends it again.
                    Err(error) => self.fail(error.into()),
                },
                Step::Closing => self.end = Some(End::Failed(status::shutting_down())),
                Step::Request(Ok(Some(request))) => {
                    if let Err(error) = self.accept(request).await {
                        self.end = Some(End::Failed(error.into()));
                    }
                }
                Step::Request(Ok(None)) => self.end = Some(End::Done),
                Step::Request(Err(status)) => {
                    self.end = Some(End::Failed(status::explain(&status)));
                }
                Step::Nothing => return self.finish(),
            }
        }
    }

    /// Waits for whatever comes next. Settling goes before reading.
    async fn step(&mut self) -> Step {
        let may_read = self.end.is_none() && self.under_way.len() < WINDOW;
        tokio::select! {
            biased;
            Some(settled) = self.under_way.next() => Step::Settled(settled),
            _ = self.closing.wait_for(|closing| *closing), if self.end.is_none() => Step::Closing,
            request = self.requests.message(), if may_read => Step::Request(request),
            else => Step::Nothing,
        }
    }

    /// Ends the stream at once.
    fn fail(&mut self, status: Status) {
        self.under_way = FuturesOrdered::new();
        self.end = Some(End::Failed(status));
    }

    fn finish(&mut self) -> Option<Result<StreamUsageResponse, Status>> {
        match mem::replace(self.end.as_mut()?, End::Told) {
            End::Failed(status) => Some(Err(status)),
            End::Done | End::Told => None,
        }
    }

    /// Takes a batch on its way.
    async fn accept(&mut self, request: StreamUsageRequest) -> Result<()> {
        self.shown.check(&self.auth).await?;
        let (first, wanted) = (request.offset, self.next_offset.unwrap_or(request.offset));
        let (_, events) = only(|fields| {
            let offset = match first {
                _ if first != wanted => {
                    Err(format!("must be {wanted}, where the last batch ended").into())
                }
                0..=MAX_OFFSET => Ok(()),
                _ => Err("must be 0 to 2^62".into()),
            };
            let offset = fields.take("offset", offset);
            offset.zip(fields.take("events", batch(request.events)))
        })?;
        self.next_offset = Some(first.saturating_add_unsigned(events.len() as u64));
        let (auth, usage) = (self.auth.clone(), self.usage.clone());
        self.under_way.push_back(Task(tokio::spawn(async move {
            let recorded = record(&auth, &usage, events, WhenFull::Wait).await?;
            Ok(Settled { first, recorded })
        })));
        Ok(())
    }

    /// Acknowledges a batch, and those after it that are settled as well.
    fn answer(&mut self, mut settled: Settled) -> Result<StreamUsageResponse> {
        let mut answer = StreamUsageResponse::default();
        loop {
            add(&mut answer, settled)?;
            // A message has a size: nearly all that is in it are failures.
            if answer.failures.len() >= BATCH_EVENTS {
                return Ok(answer);
            }
            match self.under_way.next().now_or_never() {
                Some(Some(Ok(next))) => settled = next,
                Some(Some(Err(error))) => {
                    // After what it follows has been acknowledged.
                    self.fail(error.into());
                    return Ok(answer);
                }
                Some(None) | None => return Ok(answer),
            }
        }
    }
}

/// A batch on its way. What has not reached the ledger when its stream ends goes with it.
struct Task(JoinHandle<Result<Settled>>);

impl Future for Task {
    type Output = Result<Settled>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(Pin::new(&mut self.0).poll(cx));
        Poll::Ready(ended.map_err(Error::internal)?)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Adds a batch to an answer.
///
/// # Errors
/// An event's error that is not for good.
fn add(answer: &mut StreamUsageResponse, settled: Settled) -> Result<()> {
    let offsets = settled.first..;
    for (offset, recorded) in offsets.zip(settled.recorded) {
        match recorded {
            Ok(Recorded::Now) => answer.recorded += 1,
            Ok(Recorded::Before) => answer.duplicates += 1,
            Err(error) => answer.failures.push(StreamFailure {
                offset,
                failure: Some(convert::usage_failure(error)?),
            }),
        }
        answer.acknowledged = offset + 1;
    }
    Ok(())
}
