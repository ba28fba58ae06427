//! A small real application behind the gateway.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};

/// Answers what it was asked, or like a language model.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    asked: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

fn whole(text: String) -> Body {
    let body = Full::from(text).map_err(|never| match never {});
    body.boxed_unsync()
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let asked = Arc::<AtomicUsize>::default();
        let mut serving = JoinSet::new();
        let count = asked.clone();
        serving.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.expect("accepted");
                let count = count.clone();
                let answer = service_fn(move |request| {
                    count.fetch_add(1, Ordering::Relaxed);
                    async move {
                        if request
                            .uri()
                            .query()
                            .is_some_and(|q| q.contains("answer=no"))
                        {
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, Infallible>(answer(&request))
                    }
                });
                open.spawn(async move {
                    let served =
                        http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                    // A gateway goes when its client does.
                    let _ = served.await;
                });
            }
        });
        Self {
            address,
            asked,
            _serving: serving,
        }
    }

    /// How many requests have come through.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

fn answer(request: &Request<Incoming>) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default();
    let query = query.split('&').filter_map(|pair| pair.split_once('='));
    let query: HashMap<&str, &str> = query.collect();
    if query.contains_key("fail-first") && !request.headers().contains_key("x-envoy-attempt-count")
    {
        panic!("the gateway is to count its attempts");
    }
    let is_first = || request.headers()["x-envoy-attempt-count"] == "1";
    if query.contains_key("fail") || (query.contains_key("fail-first") && is_first()) {
        let refusal = Response::builder().status(503);
        return refusal.body(whole(String::new())).expect("valid");
    }
    let is_model = request.uri().path().starts_with("/v1/chat/completions");
    if is_model && !query.contains_key("echo") {
        return completion(&query);
    }
    // Says what it was told, so that a test sees it.
    let headers = request.headers().iter();
    let told = headers.map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        json!([name.as_str(), value])
    });
    let body = json!({ "headers": told.collect::<Vec<_>>() }).to_string();
    let mut answer = Response::builder().header("content-type", "application/json");
    if let Some(tokens) = query.get("tokens") {
        answer = answer.header("x-tokens-used", *tokens);
    }
    answer.body(whole(body)).expect("valid")
}

/// As models answer: words, then, unless `usage=no`, what was used; with `end=no` it never ends, and with
/// `end=break` it breaks off.
fn completion(query: &HashMap<&str, &str>) -> Response<Body> {
    let number = |name: &str| {
        query
            .get(name)
            .map_or(0, |n| n.parse::<i64>().expect("a number"))
    };
    let usage = json!({"usage": {
        "prompt_tokens": number("input"),
        "completion_tokens": number("output"),
    }});
    if query.contains_key("whole") {
        let answer = Response::builder().header("content-type", "application/json");
        return answer.body(whole(usage.to_string())).expect("valid");
    }
    let mut events: Vec<String> = (0..5)
        .map(|n| json!({"choices": [{"delta": {"content": format!("word-{n}")}}]}).to_string())
        .collect();
    if query.get("usage") != Some(&"no") {
        events.push(usage.to_string());
    }
    let events = stream::iter(events).then(|event| async move {
        tokio::time::sleep(Duration::from_millis(2)).await;
        format!("data: {event}\n\n")
    });
    let events = events.map(Ok);
    let events: std::pin::Pin<Box<dyn Stream<Item = io::Result<String>> + Send>> =
        match query.get("end") {
            Some(&"no") => Box::pin(events.chain(stream::pending())),
            Some(&"break") => {
                let end = stream::once(async {
                    // What it has said is to arrive.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    Err(io::Error::other("it breaks off"))
                });
                Box::pin(events.chain(end))
            }
            _ => Box::pin(events.chain(stream::iter([Ok("data: [DONE]\n\n".to_owned())]))),
        };
    let frames = events.map(|event| event.map(|event| Frame::data(Bytes::from(event))));
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(StreamBody::new(frames).boxed_unsync())
        .expect("valid")
}
