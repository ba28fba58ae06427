//! Events of the outbox, posted to a receiver of the test's own.

use std::{
    collections::{BTreeSet, VecDeque},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::Utc;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};
use tollkeeper::config::{Secret, Settings};
use uuid::Uuid;

use crate::{
    harness::{RunningServer, TestApp, eventually},
    ops::scrape,
    usage::event,
};

const KEY: [u8; 32] = *b"32 bytes that sign what is sent!";

/// What was posted.
#[derive(Clone, Debug)]
struct Post {
    path: String,
    host: String,
    content_type: String,
    id: String,
    timestamp: i64,
    signature: String,
    body: String,
}

/// Answers posts with `answers` in their order, then with 200; 0 never answers.
struct Receiver {
    address: SocketAddr,
    posts: Arc<Mutex<Vec<Post>>>,
    _serving: JoinSet<()>,
}

impl Receiver {
    async fn answering(answers: &[u16]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::on(listener, answers)
    }

    fn on(listener: TcpListener, answers: &[u16]) -> Self {
        let address = listener.local_addr().unwrap();
        let posts: Arc<Mutex<Vec<Post>>> = Arc::default();
        let answers = Arc::new(Mutex::new(VecDeque::from(answers.to_vec())));
        let mut serving = JoinSet::new();
        let taken = posts.clone();
        serving.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (taken, answers) = (taken.clone(), answers.clone());
                let answer =
                    service_fn(move |request| take(request, taken.clone(), answers.clone()));
                open.spawn(async move {
                    let served =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                    // The sender goes once it has the status.
                    let _ = served.await;
                });
            }
        });
        Self {
            address,
            posts,
            _serving: serving,
        }
    }

    fn posts(&self) -> Vec<Post> {
        self.posts.lock().unwrap().clone()
    }
}

async fn take(
    request: Request<Incoming>,
    taken: Arc<Mutex<Vec<Post>>>,
    answers: Arc<Mutex<VecDeque<u16>>>,
) -> Result<Response<String>, Infallible> {
    let (head, body) = request.into_parts();
    assert_eq!(head.method, "POST");
    let header = |name: &str| head.headers[name].to_str().unwrap().to_owned();
    let post = Post {
        path: head.uri.to_string(),
        host: header("host"),
        content_type: header("content-type"),
        id: header("webhook-id"),
        timestamp: header("webhook-timestamp").parse().unwrap(),
        signature: header("webhook-signature"),
        body: String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap(),
    };
    taken.lock().unwrap().push(post);
    let status = answers.lock().unwrap().pop_front().unwrap_or(200);
    if status == 0 {
        std::future::pending::<()>().await;
    }
    let mut answer = Response::new("the answer of a stranger".to_owned());
    *answer.status_mut() = status.try_into().unwrap();
    let location = "/elsewhere".parse().unwrap();
    answer.headers_mut().insert("location", location);
    Ok(answer)
}

/// HMAC as RFC 2104 has it, of nothing but the hash.
fn signature(post: &Post) -> String {
    let pad = |with: u8| {
        let mut block = [with; 64];
        block
            .iter_mut()
            .zip(KEY)
            .for_each(|(byte, key)| *byte ^= key);
        block
    };
    let signed = format!("{}.{}.{}", post.id, post.timestamp, post.body);
    let inner = digest(&SHA256, &[&pad(0x36)[..], signed.as_bytes()].concat());
    let outer = digest(&SHA256, &[&pad(0x5c)[..], inner.as_ref()].concat());
    format!("v1,{}", STANDARD.encode(outer))
}

fn posting_to(address: SocketAddr, settings: &mut Settings) {
    settings.webhook.url = format!("http://{address}/hooks?from=quota");
    settings.webhook.secret = Secret::new(format!("whsec_{}", STANDARD.encode(KEY)));
}

/// A further server on the same database, which posts.
async fn posting_replica(app: &TestApp, address: SocketAddr) -> RunningServer {
    let mut settings = app.settings().clone();
    posting_to(address, &mut settings);
    RunningServer::start(&settings).await.unwrap()
}

async fn put_events(app: &TestApp, events: u32) {
    app.sql(&format!(
        "INSERT INTO outbox (id, kind, payload)
         SELECT gen_random_uuid(), 'quota.threshold_reached', jsonb_build_object('n', n)
         FROM generate_series(1, {events}) AS n"
    ))
    .await;
}

/// Brings a user of the built-in tier `free` to 80 percent.
async fn use_most(app: &TestApp) -> String {
    let user = app.user().tier("free").create().await.id;
    let mut most = event(&user);
    most.tokens.as_mut().unwrap().input = 85_000;
    app.record(&most).await.unwrap();
    user
}

const PENDING: &str = "SELECT count(*) FROM outbox WHERE delivered_at IS NULL";

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_is_posted_with_a_signature_until_it_is_taken() {
    let receiver = Receiver::answering(&[500, 302, 200]).await;
    let address = receiver.address;
    let app = TestApp::spawn_with(|settings| posting_to(address, settings)).await;
    let user = use_most(&app).await;
    eventually("taken", async || receiver.posts().len() == 3).await;
    eventually("written down", async || app.count(PENDING).await == 0).await;
    let posts = receiver.posts();
    for post in &posts {
        assert_eq!(post.signature, signature(post));
        assert!((Utc::now().timestamp() - post.timestamp).abs() < 60);
        assert_eq!((&post.id, &post.body), (&posts[0].id, &posts[0].body));
        assert_eq!(post.path, "/hooks?from=quota");
        assert_eq!(post.host, address.to_string());
        assert_eq!(post.content_type, "application/json");
    }
    let told: Value = serde_json::from_str(&posts[0].body).unwrap();
    assert_eq!(told["type"], "quota.threshold_reached");
    assert_eq!(told["data"]["user_id"], user);
    assert_eq!(told["data"]["threshold_percent"], 80);
    assert_eq!(told["data"]["limit_tokens"], 100_000);
    let row = &app
        .sql("SELECT id::text, attempts, last_error FROM outbox")
        .await[0];
    assert_eq!(row.get::<_, String>(0), posts[0].id);
    assert_eq!(row.get::<_, i32>(1), 3);
    assert_eq!(row.get::<_, Option<String>>(2), None);
    let series = scrape(app.ops_address).await;
    let attempts =
        |result| series[&format!("tollkeeper_webhook_attempts_total{{result=\"{result}\"}}")];
    assert_eq!((attempts("failed"), attempts("delivered")), (2.0, 1.0));
    // What is delivered is not posted again when others are.
    put_events(&app, 1).await;
    eventually("another", async || receiver.posts().len() > 3).await;
    eventually("written down", async || app.count(PENDING).await == 0).await;
    assert_ne!(receiver.posts()[3].id, posts[0].id);
    assert_eq!(receiver.posts().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_wait_for_a_receiver_and_survive_those_who_claimed_them() {
    // Nobody is to be told.
    let app = TestApp::spawn().await;
    use_most(&app).await;
    eventually("it waits", async || {
        scrape(app.ops_address).await["tollkeeper_outbox_pending"] == 1.0
    })
    .await;
    assert!(scrape(app.ops_address).await["tollkeeper_outbox_oldest_seconds"] > 0.0);
    assert_eq!(app.count("SELECT attempts::bigint FROM outbox").await, 0);

    // Nobody listens.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let replica = posting_replica(&app, address).await;
    let failed = "SELECT count(*) FROM outbox WHERE last_error = 'no connection'";
    eventually("tried", async || app.count(failed).await == 1).await;
    replica.stop().await.unwrap();

    // Somebody listens, and who posts to them is killed meanwhile.
    let silent = Receiver::answering(&[0]).await;
    let replica = posting_replica(&app, silent.address).await;
    eventually("posted", async || silent.posts().len() == 1).await;
    replica.stop().await.unwrap();
    let claimed = "SELECT count(*) FROM outbox
        WHERE delivered_at IS NULL AND available_at > now() + interval '20 s'";
    assert_eq!(app.count(claimed).await, 1);

    // The claim is over.
    app.sql("UPDATE outbox SET available_at = now()").await;
    let receiver = Receiver::answering(&[]).await;
    let _replica = posting_replica(&app, receiver.address).await;
    eventually("delivered", async || app.count(PENDING).await == 0).await;
    assert_eq!(receiver.posts().len(), 1);
    assert_eq!(receiver.posts()[0].id, silent.posts()[0].id);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_what_is_to_be_posted() {
    let app = TestApp::spawn().await;
    let receiver = Receiver::answering(&[]).await;
    let _first = posting_replica(&app, receiver.address).await;
    let _second = posting_replica(&app, receiver.address).await;
    put_events(&app, 300).await;
    // Of a kind that is somebody else's.
    app.sql("INSERT INTO outbox (id, kind, payload) VALUES (gen_random_uuid(), 'mail', '{}')")
        .await;
    eventually("all are delivered", async || app.count(PENDING).await == 1).await;
    let posts = receiver.posts();
    let ids: BTreeSet<&str> = posts.iter().map(|post| post.id.as_str()).collect();
    assert_eq!((ids.len(), posts.len()), (300, 300));
    for post in &posts {
        assert_eq!(post.signature, signature(post));
    }
    let numbers: BTreeSet<u64> = posts
        .iter()
        .map(|post| {
            serde_json::from_str::<Value>(&post.body).unwrap()["n"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(numbers, BTreeSet::from_iter(1..=300));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_refused_again_and_again_keeps_no_other_waiting() {
    let receiver = Receiver::answering(&[503; 8]).await;
    let app = TestApp::spawn().await;
    let _replica = posting_replica(&app, receiver.address).await;
    put_events(&app, 8).await;
    let refused = "SELECT count(*) FROM outbox WHERE last_error = 'answered 503'";
    eventually("refused", async || receiver.posts().len() >= 8).await;
    put_events(&app, 20).await;
    eventually("all are delivered", async || app.count(PENDING).await == 0).await;
    assert_eq!(app.count(refused).await, 0);
    let attempts = app.count("SELECT sum(attempts) FROM outbox").await;
    assert_eq!(attempts, 36);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivered_events_are_deleted_after_a_week_and_others_are_kept() {
    let app = TestApp::spawn().await;
    for (created, delivered) in [
        ("30 days", "8 days"),
        ("30 days", "6 days"),
        ("30 days", ""),
    ] {
        let delivered = match delivered {
            "" => "NULL".to_owned(),
            ago => format!("now() - interval '{ago}'"),
        };
        app.sql(&format!(
            "INSERT INTO outbox (id, kind, payload, created_at, delivered_at) VALUES
             ('{}', 'quota.threshold_reached', '{}', now() - interval '{created}', {delivered})",
            Uuid::now_v7(),
            json!({})
        ))
        .await;
    }
    let _replica = app.replica().await;
    let old = "SELECT count(*) FROM outbox WHERE delivered_at < now() - interval '7 days'";
    eventually("deleted", async || app.count(old).await == 0).await;
    assert_eq!(app.count("SELECT count(*) FROM outbox").await, 2);
    assert_eq!(app.count(PENDING).await, 1);
}
