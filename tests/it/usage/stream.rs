use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tollkeeper::proto::tollkeeper::{
    admin::v1::DisableServiceAccountRequest,
    usage::v1::{
        StreamUsageRequest, StreamUsageResponse, UsageEvent, record_usage_response::Outcome,
        usage_service_client::UsageServiceClient,
    },
};
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{event, record_through, refuse_model, tokens};
use crate::harness::{Blocker, TestApp, reason, with_bearer};

/// A stream under way.
pub(super) struct Stream {
    pub(super) requests: mpsc::Sender<StreamUsageRequest>,
    answers: Streaming<StreamUsageResponse>,
}

impl Stream {
    pub(super) async fn open(channel: &Channel, key: &str) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(1);
        let request = with_bearer(ReceiverStream::new(receiver), key);
        let mut usage = UsageServiceClient::new(channel.clone());
        let answers = usage.stream_usage(request).await?.into_inner();
        Ok(Self { requests, answers })
    }

    pub(super) async fn send(&self, offset: i64, events: &[UsageEvent]) {
        let events = events.to_vec();
        let request = StreamUsageRequest { offset, events };
        // An error means that the server has ended the stream, and its status tells why.
        let _ = self.requests.send(request).await;
    }

    /// All answers until everything before `offset` is settled, added up.
    pub(super) async fn until(&mut self, offset: i64) -> Result<StreamUsageResponse, Status> {
        let mut all = StreamUsageResponse::default();
        while all.acknowledged < offset {
            let answer = self.answers.message().await?.expect("the stream goes on");
            assert!(answer.acknowledged > all.acknowledged, "it goes forward");
            all.acknowledged = answer.acknowledged;
            all.recorded += answer.recorded;
            all.duplicates += answer.duplicates;
            all.failures.extend(answer.failures);
        }
        Ok(all)
    }

    /// How it ends, and what was settled before.
    pub(super) async fn end(&mut self) -> (i64, Result<(), Status>) {
        let mut acknowledged = 0;
        loop {
            match self.answers.message().await {
                Ok(Some(answer)) => acknowledged = answer.acknowledged,
                Ok(None) => return (acknowledged, Ok(())),
                Err(status) => return (acknowledged, Err(status)),
            }
        }
    }
}

impl TestApp {
    pub(super) async fn stream(&self) -> Stream {
        Stream::open(&self.channel, &self.service_key)
            .await
            .unwrap()
    }
}

async fn events(app: &TestApp, count: usize) -> Vec<UsageEvent> {
    let user = app.user().create().await;
    (0..count).map(|_| event(&user.id)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_acknowledges_what_it_has_booked_from_any_offset_on() {
    let app = TestApp::spawn().await;
    let events = events(&app, 5000).await;
    let mut stream = app.stream().await;
    let requests = stream.requests.clone();
    let batches: Vec<_> = events.chunks(70).map(<[_]>::to_vec).collect();
    let sending = tokio::spawn(async move {
        let mut offset = 1_000_000;
        for events in batches {
            let count = i64::try_from(events.len()).unwrap();
            let request = StreamUsageRequest { offset, events };
            requests.send(request).await.unwrap();
            offset += count;
        }
    });
    let all = stream.until(1_005_000).await.unwrap();
    sending.await.unwrap();
    assert_eq!((all.recorded, all.duplicates), (5000, 0));
    assert_eq!(all.failures, []);
    drop(stream.requests);
    assert!(
        stream.answers.message().await.unwrap().is_none(),
        "it ends well"
    );
    app.assert_books_balance(5000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_refuses_has_an_offset_and_a_reason() {
    let app = TestApp::spawn().await;
    refuse_model(&app, "poison").await;
    let mut events = events(&app, 6).await;
    events[1].model = "a model".to_owned();
    events[2] = events[0].clone();
    events[3].model = "poison".to_owned();
    events[4] = UsageEvent {
        tokens: tokens(9),
        ..events[0].clone()
    };
    let mut stream = app.stream().await;
    stream.send(10, &events[..3]).await;
    // Batches that are on their way together may be booked in any order: with them, either of two
    // events with one id might be the first.
    let first = stream.until(13).await.unwrap();
    assert_eq!((first.recorded, first.duplicates), (1, 1));
    stream.send(13, &events[3..]).await;
    let second = stream.until(16).await.unwrap();
    assert_eq!((second.recorded, second.duplicates), (1, 0));
    let failures = first.failures.into_iter().chain(second.failures);
    let failures: Vec<_> = failures
        .map(|one| (one.offset, one.failure.unwrap().reason))
        .collect();
    let expected = [
        (11, "INVALID_FIELD"),
        (13, "INTERNAL"),
        (14, "EVENT_CONFLICT"),
    ];
    assert_eq!(failures, expected.map(|(at, why)| (at, why.to_owned())));
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_begins_again_where_it_was_acknowledged_counts_once() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let events = events(&app, 3000).await;
    let mut settled = 0;
    // Each stream is cut in the middle of things, the last one is not.
    for round in 0..6 {
        let channel = if round % 2 == 0 {
            app.running().channel()
        } else {
            replica.channel()
        };
        let mut stream = Stream::open(&channel, &app.service_key).await.unwrap();
        let requests = stream.requests.clone();
        let left = events[usize::try_from(settled).unwrap()..].to_vec();
        let first = settled;
        let sending = tokio::spawn(async move {
            let mut offset = first;
            for events in left.chunks(37) {
                let events = events.to_vec();
                let count = i64::try_from(events.len()).unwrap();
                let request = StreamUsageRequest { offset, events };
                if requests.send(request).await.is_err() {
                    break;
                }
                offset += count;
            }
        });
        let goal = if round == 5 { 3000 } else { settled + 200 };
        settled = stream.until(goal.min(3000)).await.unwrap().acknowledged;
        drop(stream);
        drop(channel);
        sending.await.unwrap();
        if settled == 3000 {
            // One answer may settle many; nothing is left to wait for.
            break;
        }
    }
    assert_eq!(settled, 3000);
    app.assert_books_balance(3000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_out_of_order_ends_the_stream_after_those_before_it() {
    let app = TestApp::spawn().await;
    let events = events(&app, 10).await;
    for wrong in [3, 5, -1, i64::MAX] {
        let mut stream = app.stream().await;
        stream.send(0, &events[..4]).await;
        stream.send(wrong, &events[4..]).await;
        let (acknowledged, end) = stream.end().await;
        assert_eq!(acknowledged, 4);
        let status = end.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(reason(&status), "INVALID_FIELD");
    }
    app.assert_books_balance(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_key_that_opened_it() {
    let app = TestApp::spawn().await;
    let events = events(&app, 2).await;
    let (id, key) = app.service("streamer", &["usage.write"]).await;
    let mut stream = Stream::open(&app.channel, &key).await.unwrap();
    stream.send(0, &events[..1]).await;
    stream.until(1).await.unwrap();
    let request = DisableServiceAccountRequest {
        service_account_id: id,
    };
    let mut admin = app.admin(&app.service_key);
    admin.disable_service_account(request).await.unwrap();
    stream.send(1, &events[1..]).await;
    let status = stream.end().await.1.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(reason(&status), "ACCOUNT_DISABLED");
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_does_not_hold_up_the_end_of_the_server() {
    let app = TestApp::spawn().await;
    let events = events(&app, 1).await;
    let mut stream = app.stream().await;
    stream.send(0, &events).await;
    stream.until(1).await.unwrap();
    let stopping = tokio::spawn(app.stop());
    let status = stream.end().await.1.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(reason(&status), "SHUTTING_DOWN");
    let stopped = timeout(Duration::from_secs(10), stopping).await;
    stopped.expect("at once").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_wait_leave_room_for_calls_that_do_not() {
    let app = TestApp::spawn_with(|settings| settings.usage.queue_events = 2000).await;
    let events = events(&app, 5001).await;
    let (single, events) = events.split_last().unwrap();
    let mut stream = app.stream().await;
    let blocker = Blocker::lock(&app, "monthly_model_usage").await;
    for (n, batch) in (0..).zip(events.chunks(500)) {
        stream.send(n * 500, batch).await;
    }
    blocker.hold_up(&app, 2).await;
    let (channel, key, single) = (app.channel.clone(), app.service_key.clone(), single.clone());
    let call = tokio::spawn(async move { record_through(&channel, &key, &single).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        !call.is_finished(),
        "it waits to be written, and is not refused"
    );
    blocker.release().await;
    assert_eq!(call.await.unwrap().unwrap(), Outcome::Recorded);
    stream.until(5000).await.unwrap();
    app.assert_books_balance(5001).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nothing_can_be_written_a_stream_reads_no_further_and_loses_nothing() {
    const BATCHES: usize = 100;
    const EVENTS: i64 = 20;
    let app = TestApp::spawn().await;
    // A connection lets a few of these batches wait unread.
    let mut events = events(&app, BATCHES * 20).await;
    for event in &mut events {
        let labels = (0..15).map(|n| (format!("label-{n}"), "v".repeat(256)));
        event.labels.extend(labels);
    }
    let mut stream = app.stream().await;
    let blocker = Blocker::lock(&app, "monthly_model_usage").await;
    let requests = stream.requests.clone();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let sending = tokio::spawn(async move {
        for (n, events) in (0..).zip(events.chunks(20)) {
            let (offset, events) = (n * EVENTS, events.to_vec());
            let request = StreamUsageRequest { offset, events };
            requests.send(request).await.unwrap();
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = sent.load(Ordering::Relaxed);
    assert!(
        (10..BATCHES - 10).contains(&before),
        "{before} batches sent"
    );
    blocker.release().await;
    let all = stream.until(100 * EVENTS).await.unwrap();
    sending.await.unwrap();
    assert_eq!((all.recorded, all.duplicates), (100 * EVENTS, 0));
    app.assert_books_balance(100 * EVENTS).await;
}
