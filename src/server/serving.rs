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
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
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

/// So often in a row what a connection has brought meanwhile is begun.
const ROUNDS: usize = 4;

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
    let served = http2::Builder::new(fresh.queue())
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
        for _ in 0..ROUNDS {
            if let Poll::Ready(ended) = served.as_mut().poll(cx) {
                return Poll::Ready(ended);
            }
            // What they answer is written by the next look at the connection.
            if !fresh.begin() {
                return Poll::Pending;
            }
        }
        // A client that always has more lets others have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    });
    if let Err(error) = ended.await {
        debug!(%error, "a connection ended badly");
    }
}

/// Calls that came and were not begun. With the connection those end that never were.
#[derive(Default)]
struct Fresh(Arc<Mutex<Vec<Call>>>);

type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where the connection puts its calls. Each call holds one as well: if that kept the queue alive, calls
/// and queue would keep each other.
#[derive(Clone)]
struct Queue(Weak<Mutex<Vec<Call>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Queue {
    fn execute(&self, call: F) {
        if let Some(calls) = self.0.upgrade() {
            lock(&calls).push(Box::pin(call));
        }
    }
}

impl Fresh {
    fn queue(&self) -> Queue {
        Queue(Arc::downgrade(&self.0))
    }

    /// Begins all; answers whether there were any.
    fn begin(&self) -> bool {
        let mut calls = mem::take(&mut *lock(&self.0));
        let are_there = !calls.is_empty();
        for mut call in calls.drain(..) {
            let look = AssertUnwindSafe(move || {
                // Whoever waits is looked at once more, by a task that can be woken.
                let mut nobody = Context::from_waker(Waker::noop());
                call.as_mut().poll(&mut nobody).is_pending().then_some(call)
            });
            // One that panics ends itself only, as a task does.
            if let Ok(Some(call)) = catch_unwind(look) {
                tokio::spawn(call);
            }
        }
        // The next ones need no memory of their own.
        let mut fresh = lock(&self.0);
        if fresh.is_empty() {
            *fresh = calls;
        }
        are_there
    }
}

fn lock(calls: &Mutex<Vec<Call>>) -> MutexGuard<'_, Vec<Call>> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
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
    use std::{future::pending, panic::resume_unwind, time::Instant};

    use http::Method;
    use tokio::{
        net::{TcpListener, TcpStream},
        sync::oneshot,
    };

    use super::*;
    use crate::server::Workers;

    #[tokio::test]
    async fn a_call_that_waits_gets_a_task_and_one_that_panics_harms_nobody() {
        let fresh = Fresh::default();
        let (question, asked) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        fresh
            .queue()
            .execute(async { resume_unwind(Box::new("on purpose")) });
        fresh.queue().execute(async move {
            let word: &str = asked.await.expect("asked");
            answer.send(word).expect("waited for");
        });
        assert!(fresh.begin());
        assert!(!fresh.begin());
        question.send("now").expect("it waits");
        assert_eq!(answered.await, Ok("now"));
    }

    /// Never answers, and shows how many wait.
    #[derive(Clone)]
    struct Silent(Arc<()>);

    impl Service<Request<Body>> for Silent {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

        fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _request: Request<Body>) -> Self::Future {
            let waits = self.0.clone();
            Box::pin(async move {
                let _waits = waits;
                pending().await
            })
        }
    }

    #[tokio::test]
    async fn of_calls_that_are_never_begun_nothing_stays() {
        let count = Arc::new(());
        let silent = Silent(count.clone());
        let workers = Workers::start(1, 10, None, move |incoming, stop| {
            let silent = silent.clone();
            serve(incoming, 256, stop, move |_| silent.clone())
        });
        let workers = workers.expect("started");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let idle = Arc::strong_count(&count);
        let client = async {
            let stream = TcpStream::connect(address).await.expect("connected");
            let (mut client, connection) =
                h2::client::handshake(stream).await.expect("it is HTTP/2");
            // All in one write: a tunnel with a body, which ends the connection, is met in the same look
            // as the calls before it.
            let mut streams = Vec::new();
            for _ in 0..50 {
                let request = Request::post("http://localhost/a.Service/Call");
                let request = request.body(()).expect("a request");
                streams.push(client.send_request(request, false).expect("sent"));
            }
            let tunnel = Request::builder()
                .method(Method::CONNECT)
                .uri("localhost:1")
                .header("content-length", "1");
            let tunnel = tunnel.body(()).expect("a request");
            streams.push(client.send_request(tunnel, false).expect("sent"));
            let _: Result<(), h2::Error> = connection.await;
            let patience = Instant::now() + Duration::from_secs(10);
            while Arc::strong_count(&count) > idle {
                assert!(Instant::now() < patience, "calls are left");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            gone = workers.accept(&listener) => gone.expect("the workers run"),
            () = client => {}
        }
    }
}
