//! What is held and charged through the real gateway.

use http::{Method, StatusCode};

use super::{
    edge::{Site, told},
    upstream::Upstream,
};
use crate::{
    harness::{Edge, TestApp, eventually, reason},
    usage::reservations::Client,
};

#[tokio::test(flavor = "multi_thread")]
async fn over_quota_is_429_with_how_much_there_is_and_when_there_is_more() {
    let site = Site::start().await;
    let (_, token) = site.user(999).await;
    let model = "/v1/chat/completions";
    // Less than the estimate of the route.
    let answer = site.prompt(model, &token).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let policy = answer.header("ratelimit-policy").to_owned();
    assert!(
        policy.starts_with("\"monthly-tokens\";q=999;qu=\"tokens\";w="),
        "{policy}"
    );
    let standing = answer.header("ratelimit").to_owned();
    let wait = answer.header("retry-after").to_owned();
    assert!(wait.parse::<u64>().unwrap() > 0);
    assert!(
        standing.starts_with("\"monthly-tokens\";r=999;t="),
        "{standing}"
    );
    assert_eq!(answer.headers.get_all("ratelimit").iter().count(), 1);
    let problem = answer.json().await;
    assert_eq!(problem["code"], "QUOTA_EXCEEDED");
    assert_eq!(problem["violated-policies"][0], "monthly-tokens");
    assert_eq!(site.upstream.asked(), 0);

    // The other way, by descriptors: it answers as long as something is left.
    let (user, token) = site.user(100).await;
    let answer = site.get("/tools/x?tokens=60", &token).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=100;t=")
    );
    eventually("it is charged", async || site.known(&user).await == 60).await;
    let answer = site.get("/tools/x?tokens=70", &token).await;
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=40;t=")
    );
    eventually("it is charged", async || site.known(&user).await == 130).await;
    assert_eq!(site.used(&user).await, (0, 130, 2));
    let before = site.upstream.asked();
    let answer = site.get("/tools/x?tokens=1", &token).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=0;t=")
    );
    assert_eq!(answer.header("content-type"), "application/problem+json");
    assert!(answer.header("retry-after").parse::<u64>().unwrap() > 0);
    assert_eq!(answer.json().await["code"], "QUOTA_EXCEEDED");
    assert_eq!(site.upstream.asked(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_is_denied() {
    let app = TestApp::spawn().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        let look = "hits_addend: { number: 0 }";
        assert_eq!(delivered.matches(look).count(), 1);
        delivered.replace(look, "hits_addend: { number: 5, is_negative_hits: true }")
    })
    .await;
    let token = app.login(&app.user().create().await).await.access_token;
    let authorization = format!("Bearer {token}");
    let answer = edge
        .get("/tools/x", &[("authorization", &authorization)])
        .await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let problem = answer.json().await;
    assert_eq!(problem["code"], "INVALID_FIELD");
    assert!(problem["detail"].as_str().unwrap().contains("hits_addend"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_charged_once_and_exactly_as_it_reports_streamed_or_whole() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let (mut input, mut output) = (0, 0);
    for (count, more) in [(1, ""), (2, "&whole=yes"), (3, "")] {
        let path = format!("/v1/chat/completions?input={count}7&output=3{count}{more}");
        let answer = site.prompt(&path, &token).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
        assert!(
            answer
                .header("ratelimit")
                .starts_with("\"monthly-tokens\";r=")
        );
        answer.text().await;
        input += count * 10 + 7;
        output += 30 + count;
        // Both dimensions are one event.
        eventually("it is charged", async || {
            site.used(&user).await == (input, output, count)
        })
        .await;
    }
    site.nothing_stays_held(&user).await;
    println!(
        "reported {:?}, charged {:?}",
        (input, output),
        site.used(&user).await
    );
    site.app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_the_gateway_had_to_ask_for_twice_is_charged_once() {
    let app = TestApp::spawn().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        let route = "route: { cluster: app, timeout: 600s }";
        assert_eq!(delivered.matches(route).count(), 1);
        let retries = "retry_policy: { retry_on: 5xx, num_retries: 2 }";
        let with = format!("route: {{ cluster: app, timeout: 600s, {retries} }}");
        let delivered = delivered.replace(route, &with);
        let hosts = "domains: [\"*\"]";
        let counting = format!("{hosts}\n              include_request_attempt_count: true");
        delivered.replace(hosts, &counting)
    })
    .await;
    let site = Site {
        app,
        edge,
        upstream,
    };
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?input=5&output=6&fail-first=yes";
    let answer = site.prompt(path, &token).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
    answer.text().await;
    assert_eq!(site.upstream.asked(), 2);
    eventually("it is charged", async || {
        site.used(&user).await == (5, 6, 1)
    })
    .await;
    site.nothing_stays_held(&user).await;
    site.app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_pays_what_was_reported_until_then() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?input=11&output=22&end=no";
    let mut answer = site.prompt(path, &token).await;
    assert_eq!(answer.status, StatusCode::OK);
    answer.read_until("completion_tokens").await;
    assert_eq!(site.used(&user).await, (0, 0, 0));
    drop(answer);
    eventually("it is charged", async || {
        site.used(&user).await == (11, 22, 1)
    })
    .await;
    site.nothing_stays_held(&user).await;
    println!("reported until then: {:?}", site.used(&user).await);
    site.app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_does_not_say_what_it_used_costs_the_estimate() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?usage=no";
    let estimate = 1000;

    // The client hangs up in the middle.
    let mut answer = site.prompt(&format!("{path}&end=no"), &token).await;
    answer.read_until("word-4").await;
    assert_eq!(site.held(&user).await, estimate);
    drop(answer);
    let charged = async |count| site.used(&user).await == (0, count * estimate, count);
    eventually("the estimate is charged", async || charged(1).await).await;

    // It comes to its end, without.
    site.prompt(path, &token).await.text().await;
    eventually("the estimate is charged", async || charged(2).await).await;

    // The client is gone before anything is answered.
    let asked = site.upstream.asked();
    let unanswered = format!("{path}&answer=no");
    tokio::select! {
        answer = site.prompt(&unanswered, &token) => panic!("{}", answer.status),
        () = eventually("it is asked", async || site.upstream.asked() > asked) => {}
    }
    eventually("the estimate is charged", async || charged(3).await).await;
    site.nothing_stays_held(&user).await;

    // An error is free.
    let answer = site.prompt(&format!("{path}&fail=yes"), &token).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    site.nothing_stays_held(&user).await;
    println!("three answers without usage: {:?}", site.used(&user).await);
    assert!(charged(3).await);
    site.app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_breaks_off_costs_what_it_reported_else_the_estimate() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?usage=no&end=break";
    let mut answer = site.prompt(path, &token).await;
    assert_eq!(answer.status, StatusCode::OK);
    answer.read_until("word-4").await;
    // The client is still there.
    let charged = async |expected| site.used(&user).await == expected;
    eventually("it is charged", async || charged((0, 1000, 1)).await).await;
    let path = "/v1/chat/completions?input=11&output=22&end=break";
    let mut other = site.prompt(path, &token).await;
    other.read_until("completion_tokens").await;
    eventually("it is charged", async || charged((11, 1022, 2)).await).await;
    site.nothing_stays_held(&user).await;
    drop((answer, other));
    site.app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_to_ask_the_model_costs_something() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    // Where servers take them for the same, these are the same.
    for (count, path) in [
        (1, "/v1/chat/completions/?input=1"),
        (2, "/V1/Chat/completions"),
    ] {
        site.prompt(path, &token).await.text().await;
        eventually("it is charged", async || site.used(&user).await.2 == count).await;
    }
    for (method, path) in [
        (Method::GET, "/v1/chat/completions?usage=no"),
        (Method::DELETE, "/v1/chat/completions/one"),
        (Method::POST, "/v1/chat/completions/one"),
    ] {
        let authorization = format!("Bearer {token}");
        let headers = [("authorization", authorization.as_str())];
        let answer = site.edge.send(method, path, &headers, "").await;
        assert_eq!(answer.status, StatusCode::OK);
        // What asks for nothing holds nothing.
        assert!(!answer.headers.contains_key("ratelimit"), "{path}");
        answer.text().await;
    }
    site.prompt("/v1/chat/completions?input=5", &token)
        .await
        .text()
        .await;
    eventually("it is charged", async || site.used(&user).await.2 == 3).await;
    site.nothing_stays_held(&user).await;
    site.app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_books_itself_is_believed_where_the_end_releases_and_not_where_it_settles()
{
    for op in ["release", "settle"] {
        let app = TestApp::spawn().await;
        let (_, key) = app.service("edge", &["gateway"]).await;
        let upstream = Upstream::start().await;
        let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
            let end = "descriptor_value: settle }";
            assert_eq!(delivered.matches(end).count(), 1);
            let delivered = delivered.replace(end, &format!("descriptor_value: {op} }}"));
            let route = "route: { cluster: app, timeout: 600s }";
            assert_eq!(delivered.matches(route).count(), 1);
            delivered.replace(route, &format!("{route}\n{}", documented()))
        })
        .await;
        let site = Site {
            app,
            edge,
            upstream,
        };
        let (user, token) = site.user(1_000_000).await;
        // It tells the client nothing of what it used.
        let path = "/v1/chat/completions?echo=yes";
        let answer = site.prompt(path, &token).await.json().await;
        let handle = told(&answer, "x-reservation").concat();
        eventually("the end is told", async || site.held(&user).await == 0).await;
        let committed = Client::of(&site.app).commit(&handle, 42).await;
        if op == "release" {
            committed.unwrap();
            assert_eq!(site.used(&user).await, (0, 42, 1));
        } else {
            assert_eq!(reason(&committed.unwrap_err()), "EVENT_CONFLICT");
            assert_eq!(site.used(&user).await, (0, 1000, 1));
        }
        site.app.assert_books_balance(1).await;
    }
}

/// How an upstream is given the handle, as the documentation says it; indented as a route is.
fn documented() -> String {
    let text = include_str!("../../../docs/gateway.md");
    let (_, block) = text.split_once("```yaml\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    let lines = block.lines().map(|line| format!("                {line}"));
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_streams_do_not_overspend() {
    let site = Site::start().await;
    // Three times the estimate of the route, and a rest.
    let (user, token) = site.user(3_500).await;
    let asks = (0..12).map(|_| async {
        let path = "/v1/chat/completions?input=400&output=600&end=no";
        let mut answer = site.prompt(path, &token).await;
        if answer.status == StatusCode::OK {
            answer.read_until("completion_tokens").await;
        }
        answer
    });
    let answers = futures_util::future::join_all(asks).await;
    let (admitted, denied): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.status == StatusCode::OK);
    assert_eq!(admitted.len(), 3);
    for answer in denied {
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    }
    let admitted = admitted.into_iter().map(drop).count();
    eventually("all is charged", async || {
        site.used(&user).await == (1200, 1800, 3)
    })
    .await;
    let (input, output, events) = site.used(&user).await;
    println!(
        "12 asked, {admitted} admitted: {} of 3500 tokens used, in {events} events",
        input + output
    );
    site.app.assert_books_balance(3).await;
}
