//! Many events a call, and streams of them, against Postgres alone.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures_util::{future::try_join_all, stream};
use tokio::sync::Semaphore;
use tollkeeper::proto::tollkeeper::usage::v1::{
    BatchRecordUsageRequest, StreamUsageRequest, record_usage_response::Outcome, usage_result,
    usage_service_client::UsageServiceClient,
};
use tonic::transport::Channel;

use crate::{
    fixture::with_bearer,
    load::Slice,
    report::{Chart, Row},
};

use super::{
    Comparison, Stage,
    events::{Event, Events, Users},
    raw, watch_postgres,
};

/// Who works at once, each for itself: connections to Postgres, callers, streams.
const WRITERS: usize = 8;
/// As many as the service writes large batches at once.
const FEW_WRITERS: usize = 2;

/// Batches of a stream that are not acknowledged yet, at most.
const WINDOW: usize = 16;

/// The rows, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Raw,
    RawFew,
    Copy,
    Batch,
    Stream,
}

const WAYS: [Way; 5] = [Way::Raw, Way::RawFew, Way::Copy, Way::Batch, Way::Stream];

impl Way {
    fn row(self) -> Row {
        match self {
            Self::Raw => Row::new("raw", format!("insert and upsert, {WRITERS} connections")),
            Self::RawFew => {
                let title = format!("insert and upsert, {FEW_WRITERS} connections");
                Row::new("raw-few", title)
            }
            Self::Copy => {
                let title = format!("COPY into a plain table, {WRITERS} connections");
                Row::new(super::NOT_BOOKED, title)
            }
            Self::Batch => Row::new("batch", format!("BatchRecordUsage, {WRITERS} callers")),
            Self::Stream => Row::new("stream", format!("StreamUsage, {WRITERS} streams")),
        }
    }
}

pub(super) fn compare(stage: &Stage<'_>) -> anyhow::Result<Comparison> {
    let crew = stage.runtime.block_on(Crew::hire(stage))?;
    let mut panels = Vec::new();
    for &size in &stage.plan.batches {
        let rows = WAYS.map(Way::row).into();
        let title = format!("{size} events a batch, {} users", stage.people.len());
        panels.push(stage.panel(title, rows, |index| crew.turn(WAYS[index], size))?);
    }
    Ok(Comparison {
        part: "batch",
        chart: Chart {
            title: "Batches and streams against the same statement without a service",
            base: "raw",
            base_title: "the statement on as many connections",
            cpu_of: "service and Postgres per event",
            unit: "events",
            grey: &["raw", super::NOT_BOOKED],
        },
        panels,
    })
}

/// Connections to Postgres and to the service.
struct Crew<'a> {
    stage: &'a Stage<'a>,
    events: Events,
    raw: Vec<raw::Connection>,
    channels: Vec<Channel>,
}

impl<'a> Crew<'a> {
    async fn hire(stage: &'a Stage<'a>) -> anyhow::Result<Self> {
        let database = stage.fixture.database_url();
        let service = format!("http://{}", stage.service.address);
        let (mut raw, mut channels) = (Vec::new(), Vec::new());
        for _ in 0..WRITERS {
            raw.push(raw::Connection::open(database).await?);
            channels.push(Channel::from_shared(service.clone())?.connect().await?);
        }
        Ok(Self {
            stage,
            events: Events::of(&stage.people, Users::Uniform),
            raw,
            channels,
        })
    }

    fn turn(&self, way: Way, size: usize) -> anyhow::Result<Slice> {
        let service = self.stage.service.cpu()?;
        let runtime = self.stage.runtime;
        let slice = watch_postgres(self.stage.postgres, || {
            runtime.block_on(self.work(way, size))
        })?;
        let service = self.stage.service.cpu()? - service;
        Ok(Slice {
            server_cpu_us: service.as_secs_f64() * 1e6,
            ..slice
        })
    }

    async fn work(&self, way: Way, size: usize) -> anyhow::Result<Slice> {
        let begun = Instant::now();
        let stop = begun + self.stage.plan.options.slice();
        let few = &self.raw[..FEW_WRITERS];
        let latencies = match way {
            Way::Raw => self.each(&self.raw, |one| self.book(one, size, stop)).await,
            Way::RawFew => self.each(few, |one| self.book(one, size, stop)).await,
            Way::Copy => self.each(&self.raw, |one| self.copy(one, size, stop)).await,
            Way::Batch => {
                let channels = &self.channels;
                self.each(channels, |one| self.batch(one, size, stop)).await
            }
            Way::Stream => {
                let channels = &self.channels;
                self.each(channels, |one| self.stream(one, size, stop))
                    .await
            }
        }?;
        let slice = Slice::of(latencies, begun.elapsed());
        Ok(Slice {
            calls: slice.calls * size as u64,
            ..slice
        })
    }

    /// Lets all work at once; the latencies of their batches.
    async fn each<'t, T, F: Future<Output = anyhow::Result<Vec<Duration>>>>(
        &self,
        ones: &'t [T],
        work: impl Fn(&'t T) -> F,
    ) -> anyhow::Result<Vec<Duration>> {
        Ok(try_join_all(ones.iter().map(work)).await?.concat())
    }

    fn next(&self, size: usize) -> Vec<Event> {
        (0..size).map(|_| self.events.next()).collect()
    }

    async fn book(
        &self,
        connection: &raw::Connection,
        size: usize,
        stop: Instant,
    ) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while Instant::now() < stop {
            let events = self.next(size);
            let sent = Instant::now();
            connection.book(events).await?;
            latencies.push(sent.elapsed());
        }
        Ok(latencies)
    }

    async fn copy(
        &self,
        connection: &raw::Connection,
        size: usize,
        stop: Instant,
    ) -> anyhow::Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        while Instant::now() < stop {
            let events = self.next(size);
            let sent = Instant::now();
            connection.copy(&events).await?;
            latencies.push(sent.elapsed());
        }
        Ok(latencies)
    }

    async fn batch(
        &self,
        channel: &Channel,
        size: usize,
        stop: Instant,
    ) -> anyhow::Result<Vec<Duration>> {
        let mut client = UsageServiceClient::new(channel.clone());
        let recorded = Some(usage_result::Result::Outcome(Outcome::Recorded.into()));
        let mut latencies = Vec::new();
        while Instant::now() < stop {
            let events = self.next(size).into_iter().map(Event::into_message);
            let request = BatchRecordUsageRequest {
                events: events.collect(),
            };
            let request = with_bearer(request, &self.stage.fixture.service_key)?;
            let sent = Instant::now();
            let results = client
                .batch_record_usage(request)
                .await?
                .into_inner()
                .results;
            latencies.push(sent.elapsed());
            ensure!(
                results.len() == size && results.iter().all(|one| one.result == recorded),
                "not all of a batch was recorded"
            );
        }
        Ok(latencies)
    }

    async fn stream(
        &self,
        channel: &Channel,
        size: usize,
        stop: Instant,
    ) -> anyhow::Result<Vec<Duration>> {
        let places = Arc::new(Semaphore::new(WINDOW));
        // Where each batch under way ends, and when it was sent.
        let sent: Arc<Mutex<VecDeque<(i64, Instant)>>> = Arc::default();
        let batches = stream::unfold(0, {
            let (places, sent, events) = (places.clone(), sent.clone(), self.events.clone());
            move |offset| {
                let (places, sent, events) = (places.clone(), sent.clone(), events.clone());
                async move {
                    places.acquire().await.ok()?.forget();
                    if Instant::now() >= stop {
                        return None;
                    }
                    let events = (0..size).map(|_| events.next().into_message());
                    let events: Vec<_> = events.collect();
                    let end = offset + events.len() as i64;
                    let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
                    sent.push_back((end, Instant::now()));
                    Some((StreamUsageRequest { offset, events }, end))
                }
            }
        });
        let request = with_bearer(batches, &self.stage.fixture.service_key)?;
        let mut client = UsageServiceClient::new(channel.clone());
        let mut answers = client.stream_usage(request).await?.into_inner();
        let (mut latencies, mut recorded) = (Vec::new(), 0);
        while let Some(answer) = answers.message().await? {
            recorded += answer.recorded;
            let mut sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
            while sent
                .front()
                .is_some_and(|(end, _)| *end <= answer.acknowledged)
            {
                let (_, at) = sent.pop_front().context("just seen")?;
                latencies.push(at.elapsed());
                places.add_permits(1);
            }
        }
        ensure!(
            usize::try_from(recorded) == Ok(latencies.len() * size),
            "not all of a stream was recorded"
        );
        Ok(latencies)
    }
}
