//! How a worker serves its connections: HTTP/2, with calls begun by the connection that brought them.
//!
//! Most calls end when they are first looked at, so none is given a task before it has to wait. Calls
//! that came together are begun together, once the connection has nothing more to read: their answers
//! leave in one write.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::StreamExt as _;
use http::{Request, Response};
use hyper::{body, rt::Executor, server::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{select, sync::watch, task::JoinSet};
use tonic::body::Body;
use tower::Service;
use tracing::debug;

use super::{connection::Connection, workers::Incoming};
use crate::grpc::Peer;

/// A client that is silent is asked whether it is there, and has so long to answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves connections until none come any more, or `stop` turns true, and all calls have ended.
///
/// `service_of` makes the service of a connection, which must always be ready. A client may have
/// `max_streams` calls under way.
pub async fn serve<S>(
    mut incoming: Incoming,
    max_streams: u32,
    mut stop: watch::Receiver<bool>,
    service_of: impl Fn(Peer) -> S,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
    S: Send + 'static,
    S::Future: Send + 'static,
{
    let mut open = JoinSet::new();
    let stopped = stop.clone();
    let mut stop = pin!(stop.wait_for(|stop| *stop));
    loop {
        select! {
            _ = &mut stop => break,
            Some(_) = open.join_next() => {}
            taken = incoming.next() => match taken {
                Some(Ok(connection)) => {
                    let service = service_of(connection.peer());
                    open.spawn(drive(connection, max_streams, service, stopped.clone()));
                }
                Some(Err(error)) => debug!(%error, "a connection was lost before it was served"),
                None => break,
            },
        }
    }
    drop(incoming);
    while open.join_next().await.is_some() {}
}

/// Serves one connection. Once `stop` is true it takes no further call.
async fn drive<S>(
    connection: Connection,
    max_streams: u32,
    service: S,
    mut stop: watch::Receiver<bool>,
) where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
    S::Future: Send + 'static,
{
    let fresh = Fresh::default();
    let served = http2::Builder::new(fresh.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(max_streams)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(connection), Always(service));
    let mut served = pin!(served);
    let mut stop = pin!(stop.wait_for(|stop| *stop));
    let mut is_stopping = false;
    let ended = poll_fn(|cx| {
        if !is_stopping && stop.as_mut().poll(cx).is_ready() {
            is_stopping = true;
            served.as_mut().graceful_shutdown();
        }
        loop {
            if let Poll::Ready(ended) = served.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            // What they answer is written by the next look at the connection.
            if !fresh.begin() {
                return Poll::Pending;
            }
        }
    });
    if let Err(error) = ended.await {
        debug!(%error, "a connection ended badly");
    }
}

/// Calls that came and were not begun.
#[derive(Clone, Default)]
struct Fresh(Arc<Mutex<Vec<Call>>>);

type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Fresh {
    fn execute(&self, call: F) {
        self.lock().push(Box::pin(call));
    }
}

impl Fresh {
    /// Begins all; answers whether there were any.
    fn begin(&self) -> bool {
        let mut calls = mem::take(&mut *self.lock());
        let are_there = !calls.is_empty();
        for mut call in calls.drain(..) {
            // Whoever waits is looked at once more, by a task that can be woken.
            let mut nobody = Context::from_waker(Waker::noop());
            let look = AssertUnwindSafe(|| call.as_mut().poll(&mut nobody));
            // One that panics ends itself only, as a task does.
            if let Ok(Poll::Pending) = catch_unwind(look) {
                tokio::spawn(call);
            }
        }
        // The next ones need no memory of their own.
        let mut fresh = self.lock();
        if fresh.is_empty() {
            *fresh = calls;
        }
        are_there
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A service that is always ready, as the transport wants it.
struct Always<S>(S);

impl<S> hyper::service::Service<Request<body::Incoming>> for Always<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = S::Future;

    fn call(&self, request: Request<body::Incoming>) -> S::Future {
        let mut service = self.0.clone();
        let ready = service.poll_ready(&mut Context::from_waker(Waker::noop()));
        debug_assert!(ready.is_ready());
        service.call(request.map(Body::new))
    }
}

#[cfg(test)]
mod tests {
    use std::panic::resume_unwind;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_call_that_waits_gets_a_task_and_one_that_panics_harms_nobody() {
        let fresh = Fresh::default();
        let (question, asked) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        fresh.execute(async { resume_unwind(Box::new("on purpose")) });
        fresh.execute(async move {
            let word: &str = asked.await.expect("asked");
            answer.send(word).expect("waited for");
        });
        assert!(fresh.begin());
        assert!(!fresh.begin());
        question.send("now").expect("it waits");
        assert_eq!(answered.await, Ok("now"));
    }
}
