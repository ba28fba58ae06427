//! The operations port: metrics, and whether the process lives and serves, over plain HTTP.

mod rooms;

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use http::{Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tracing::debug;

pub use rooms::Rooms;

use crate::grpc::health::Readiness;

/// Those who watch are few; more wait.
const MAX_CONNECTIONS: usize = 16;

/// Longest that a connection may take for its one request and the answer.
const DEADLINE: Duration = Duration::from_secs(10);

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is served.
pub struct Ops {
    pub registry: Registry,
    pub readiness: watch::Receiver<Readiness>,
}

/// Serves until dropped.
pub async fn serve(listener: TcpListener, ops: Ops) {
    let ops = Arc::new(ops);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut open = tokio::task::JoinSet::new();
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = connection(stream, ops.clone());
                open.spawn(async move {
                    if timeout(DEADLINE, connection).await.is_err() {
                        debug!("a connection of the operations port took too long");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                debug!(%error, "a connection could not be accepted");
                sleep(Duration::from_millis(10)).await;
            }
        }
        while open.try_join_next().is_some() {}
    }
}

/// One request and its answer.
fn connection(stream: TcpStream, ops: Arc<Ops>) -> impl Future<Output = ()> {
    let answer = service_fn(move |request| {
        let answer = answer(&request, &ops);
        async { Ok::<_, Infallible>(answer) }
    });
    async move {
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answer)
            .await;
        if let Err(error) = served {
            debug!(%error, "a connection of the operations port broke");
        }
    }
}

fn answer(request: &Request<Incoming>, ops: &Ops) -> Response<String> {
    let answer = |status, kind: &'static str, text: String| {
        let mut response = Response::new(text);
        *response.status_mut() = status;
        let kind = http::HeaderValue::from_static(kind);
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    };
    let plain =
        |status, text: &str| answer(status, "text/plain; charset=utf-8", format!("{text}\n"));
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET");
    }
    match request.uri().path() {
        "/metrics" => {
            let mut text = String::new();
            match encode(&mut text, &ops.registry) {
                Ok(()) => answer(StatusCode::OK, OPENMETRICS, text),
                Err(_) => plain(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "metrics cannot be written",
                ),
            }
        }
        "/livez" => plain(StatusCode::OK, "alive"),
        "/readyz" => match *ops.readiness.borrow() {
            Readiness::Serving => plain(StatusCode::OK, "serving"),
            not_ready => plain(StatusCode::SERVICE_UNAVAILABLE, not_ready.why()),
        },
        _ => plain(StatusCode::NOT_FOUND, "try /metrics, /livez or /readyz"),
    }
}
