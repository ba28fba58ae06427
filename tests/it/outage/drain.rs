use tokio::time::Instant;

use super::*;
use crate::harness::cluster;

/// What a busy machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_finish_and_new_connections_are_refused() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (address, url) = (app.address, app.database_url.clone());
    let blocker = Blocker::lock(&app, "usage_records").await;
    let events: Vec<_> = (0..4).map(|_| event(&user.id)).collect();
    let calls: Vec<_> = events
        .iter()
        .map(|event| start_recording(&app, event.clone()))
        .collect();
    blocker.hold_up(&app, 4).await;
    let stopping = tokio::spawn(app.stop());
    eventually("new connections are refused", async || {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    assert!(!stopping.is_finished(), "waits for the calls");
    blocker.release().await;
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), Outcome::Recorded);
    }
    stopping.await.unwrap().unwrap();
    let client = cluster::connect(&url).await;
    let booked = "SELECT count(*) FROM usage_records";
    let booked: i64 = client.query_one(booked, &[]).await.unwrap().get(0);
    assert_eq!(booked, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_not_serving_before_calls_are_refused() {
    let delay = Duration::from_secs(3);
    let app = TestApp::spawn_with(|settings| settings.server.drain_delay = delay).await;
    let user = app.user().create().await;
    let (channel, key) = (app.channel.clone(), app.service_key.clone());
    eventually_reports(&channel, ServingStatus::Serving).await;
    let stopping = tokio::spawn(app.stop());
    eventually_reports(&channel, ServingStatus::NotServing).await;
    let recorded = record_through(&channel, &key, &event(&user.id)).await;
    assert_eq!(recorded.unwrap(), Outcome::Recorded);
    assert!(!stopping.is_finished());
    stopping.await.unwrap().unwrap();
    // The client's first call may still meet the connection that is just closing.
    eventually("the client finds nobody", async || {
        let refused = record_through(&channel, &key, &event(&user.id)).await;
        refused.unwrap_err().code() == Code::Unavailable
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_never_ends_is_cut_at_the_drain_deadline() {
    let deadline = Duration::from_millis(500);
    let app = TestApp::spawn_with(|settings| {
        settings.server.drain_deadline = deadline;
        settings.database.statement_timeout = Duration::from_secs(60);
        settings.server.max_deadline = Duration::from_secs(60);
    })
    .await;
    let (known, user) = (app.user().create().await, app.user().create().await);
    app.record(&event(&known.id)).await.unwrap();
    let blocker = Blocker::lock(&app, "usage_records").await;
    let calls = [&known, &user].map(|user| start_recording(&app, event(&user.id)));
    blocker.hold_up(&app, 2).await;
    let started = Instant::now();
    app.stop().await.unwrap();
    assert!(started.elapsed() >= deadline);
    assert!(started.elapsed() < deadline + SLACK);
    for call in calls {
        let cut = timeout(SLACK, call).await.expect("the call is cut");
        let cut = cut.unwrap().unwrap_err();
        assert_eq!(cut.code(), Code::Unavailable);
        assert_eq!(reason(&cut), "SHUTTING_DOWN");
        assert!(cut.get_details_retry_info().is_some());
    }
    blocker.release().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_of_health_does_not_hold_up_the_end() {
    let app = TestApp::spawn().await;
    eventually_reports(&app.channel, ServingStatus::Serving).await;
    let request = HealthCheckRequest::default();
    let watch = HealthClient::new(app.channel.clone()).watch(request).await;
    let mut watch = watch.unwrap().into_inner();
    let mut next = async || Ok::<_, Status>(watch.message().await?.map(|answer| answer.status()));
    assert_eq!(next().await.unwrap(), Some(ServingStatus::Serving));
    let started = Instant::now();
    app.stop().await.unwrap();
    assert!(started.elapsed() < SLACK, "{:?}", started.elapsed());
    assert_eq!(next().await.unwrap(), Some(ServingStatus::NotServing));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_at_rest_stops_at_once() {
    let app = TestApp::spawn().await;
    let url = app.database_url.clone();
    let started = Instant::now();
    app.stop().await.unwrap();
    assert!(started.elapsed() < SLACK);
    let client = cluster::connect(&url).await;
    let left = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'tollkeeper'";
    eventually("its connections are closed", async || {
        client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
}
