//! `WatchRevocations`: callers that keep answers hear what contradicts them.

use std::time::Duration;

use tollkeeper::{
    auth::{KeyRing, generate_key_file},
    config::SigningAlgorithm,
    proto::tollkeeper::{
        admin::v1::DisableServiceAccountRequest,
        auth::v1::{
            WatchReady, WatchRevocationsRequest, WatchRevocationsResponse,
            auth_service_client::AuthServiceClient, watch_revocations_response::Event,
        },
    },
};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::harness::{TestApp, eventually, reason, with_bearer};

const BOUND: Duration = Duration::from_millis(600);

type Events = Streaming<WatchRevocationsResponse>;

async fn open(channel: &Channel, key: &str) -> Result<Events, Status> {
    let mut auth = AuthServiceClient::new(channel.clone());
    let request = with_bearer(WatchRevocationsRequest {}, key);
    Ok(auth.watch_revocations(request).await?.into_inner())
}

/// Opens a stream as soon as the replica hears of changes.
async fn watch(channel: &Channel, key: &str) -> (Events, WatchReady) {
    let mut opened = None;
    eventually("the feed is live", async || {
        opened = open(channel, key).await.ok();
        opened.is_some()
    })
    .await;
    let mut events = opened.unwrap();
    match next(&mut events).await.unwrap() {
        Event::Ready(ready) => (events, ready),
        other => panic!("{other:?} before all"),
    }
}

async fn next(events: &mut Events) -> Result<Event, Status> {
    let message = events.message().await?;
    Ok(message
        .expect("the stream goes on")
        .event
        .expect("an event"))
}

/// The next event that is no sign of life.
async fn next_change(events: &mut Events) -> Result<Event, Status> {
    loop {
        match next(events).await? {
            Event::KeepAlive(_) => {}
            event => return Ok(event),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_changes_is_told_to_those_who_watch_another() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let (mut events, ready) = watch(&replica.channel(), &app.service_key).await;
    let within = ready.keep_alive_within.unwrap();
    assert_eq!(Duration::try_from(within).unwrap(), Duration::from_secs(2));

    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let key = app.api_key(&user, &[]).await;
    let changed = Event::UserChanged(user.id.clone());
    app.set_tier(&user.id, "builder").await;
    assert_eq!(next_change(&mut events).await.unwrap(), changed);
    app.revoke_api_key(&user, &key.id).await;
    assert_eq!(next_change(&mut events).await.unwrap(), changed);
    app.logout(&token).await;
    assert_eq!(next_change(&mut events).await.unwrap(), changed);
    app.disable(&user.id).await;
    assert_eq!(next_change(&mut events).await.unwrap(), changed);
    app.sql("TRUNCATE sessions").await;
    assert_eq!(next_change(&mut events).await.unwrap(), Event::Reset(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn signs_of_life_come_in_time_and_tell_how_far_all_is_told() {
    let app = TestApp::spawn_with(|settings| settings.auth.staleness_bound = BOUND).await;
    let (mut events, ready) = watch(&app.channel, &app.service_key).await;
    let user = app.user().create().await;
    let revision = app.disable_for_revision(&user.id).await;
    let (mut told, mut before) = (false, ready.revision);
    loop {
        let event = tokio::time::timeout(BOUND * 5, next(&mut events)).await;
        match event.expect("in time").unwrap() {
            Event::UserChanged(id) => told |= id == user.id,
            Event::KeepAlive(up_to) => {
                assert!(up_to >= before, "{up_to} after {before}");
                before.clone_from(&up_to);
                if up_to >= revision {
                    assert!(told, "said to be told, and was not");
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_break_of_the_feed_resets_and_a_silent_one_gives_no_sign_of_life() {
    let (app, proxy) =
        TestApp::spawn_behind_proxy(|settings| settings.auth.staleness_bound = BOUND).await;
    let (mut events, _) = watch(&app.channel, &app.service_key).await;
    proxy.pause_feed();
    let silence = async { while let Ok(Event::KeepAlive(_)) = next(&mut events).await {} };
    tokio::time::timeout(BOUND * 3, silence)
        .await
        .expect_err("silence");
    // Whoever comes now is sent away.
    let refused = open(&app.channel, &app.service_key).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    proxy.resume();
    assert_eq!(next_change(&mut events).await.unwrap(), Event::Reset(()));
    assert!(matches!(
        next(&mut events).await.unwrap(),
        Event::KeepAlive(_)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_falls_behind_is_told_so_and_dropped() {
    let dropped = dropped_reader().await;
    assert_eq!(dropped.code(), Code::ResourceExhausted);
    assert_eq!(reason(&dropped), "WATCH_TOO_SLOW");
}

/// What a reader is told that fell behind, while another one keeps up.
pub(crate) async fn dropped_reader() -> Status {
    let app = TestApp::spawn().await;
    // A window that a few hundred events fill.
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).unwrap();
    let narrow = endpoint
        .initial_stream_window_size(16 * 1024)
        .initial_connection_window_size(16 * 1024)
        .connect_lazy();
    let (mut slow, _) = watch(&narrow, &app.service_key).await;
    let (mut fast, _) = watch(&app.channel, &app.service_key).await;
    let reading = tokio::spawn(async move {
        let mut read = 0;
        while read < 20_000 {
            if let Event::UserChanged(_) = next(&mut fast).await.unwrap() {
                read += 1;
            }
        }
    });
    for _ in 0..20 {
        app.sql(
            "SELECT pg_notify('tollkeeper_changes', 'user ' || gen_random_uuid())
             FROM generate_series(1, 1000)",
        )
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    reading
        .await
        .expect("a reader that keeps up is not dropped");
    loop {
        if let Err(status) = next(&mut slow).await {
            return status;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_with_the_key_that_opened_it() {
    let app = TestApp::spawn_with(|settings| settings.auth.staleness_bound = BOUND).await;
    let (id, key) = app.service("watcher", &["tokens.validate"]).await;
    let (mut events, _) = watch(&app.channel, &key).await;
    let request = DisableServiceAccountRequest {
        service_account_id: id,
    };
    let mut admin = app.admin(&app.service_key);
    admin.disable_service_account(request).await.unwrap();
    let ended = loop {
        if let Err(status) = next(&mut events).await {
            break status;
        }
    };
    assert_eq!(ended.code(), Code::Unauthenticated);
    assert_eq!(reason(&ended), "ACCOUNT_DISABLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_does_not_hold_up_the_end_of_the_server() {
    let app = TestApp::spawn().await;
    let (mut events, _) = watch(&app.channel, &app.service_key).await;
    let begun = std::time::Instant::now();
    let stopping = tokio::spawn(app.stop());
    let ended = loop {
        if let Err(status) = next(&mut events).await {
            break status;
        }
    };
    assert_eq!(reason(&ended), "SHUTTING_DOWN");
    stopping.await.unwrap().unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_has_256_watchers_at_most_and_takes_others_when_some_leave() {
    let app = TestApp::spawn_with(|settings| settings.server.max_streams = 1000).await;
    let (first, _) = watch(&app.channel, &app.service_key).await;
    let mut open_ones = vec![first];
    for _ in 1..256 {
        open_ones.push(open(&app.channel, &app.service_key).await.unwrap());
    }
    let refused = open(&app.channel, &app.service_key).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason(&refused), "OVERLOADED");
    open_ones.truncate(255);
    eventually("a place is free", async || {
        open(&app.channel, &app.service_key).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_replaced_reset_what_was_kept() {
    let app = TestApp::spawn().await;
    let (mut events, _) = watch(&app.channel, &app.service_key).await;
    let token = app.login(&app.user().create().await).await.access_token;
    app.validate(&token).await.unwrap();
    let (folder, algorithm) = (tempfile::tempdir().unwrap(), SigningAlgorithm::EdDsa);
    generate_key_file(folder.path(), algorithm, false, chrono::Utc::now()).unwrap();
    let others = KeyRing::from_folder(folder.path(), algorithm).unwrap();
    app.running().auth.replace_keys(others);
    assert_eq!(next_change(&mut events).await.unwrap(), Event::Reset(()));
    app.validate(&token).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_that_never_read_lose_their_places_with_their_key() {
    let app = TestApp::spawn_with(|settings| {
        settings.server.max_streams = 1000;
        settings.auth.staleness_bound = BOUND;
    })
    .await;
    let (id, key) = app.service("watcher", &["tokens.validate"]).await;
    let (mut own, _) = watch(&app.channel, &app.service_key).await;
    // A window that the first message fills.
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).unwrap();
    let narrow = endpoint.initial_stream_window_size(16).connect_lazy();
    let mut unread = vec![];
    while let Ok(events) = open(&narrow, &key).await {
        unread.push(events);
    }
    assert_eq!(unread.len(), 255);
    // The transport holds one more message and then asks for none.
    for _ in 0..4 {
        let event = next(&mut own).await.unwrap();
        assert!(matches!(event, Event::KeepAlive(_)));
    }
    let request = DisableServiceAccountRequest {
        service_account_id: id,
    };
    let mut admin = app.admin(&app.service_key);
    admin.disable_service_account(request).await.unwrap();
    eventually("their places are free", async || {
        open(&app.channel, &app.service_key).await.is_ok()
    })
    .await;
    drop(unread);
}
