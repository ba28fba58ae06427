//! Thread-per-core serving: each worker is a thread with a runtime of its own, and a connection
//! stays with the worker it was given to.
//!
//! On the shared runtime almost every response is a write of its own; here the responses that are
//! ready together leave together. Database and background work stay on the shared runtime.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::{Stream, StreamExt as _};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use super::{
    connection::{Accepted, Connection, Share},
    tls::Tls,
};

/// Accepted connections that a worker has not taken yet.
const BACKLOG: usize = 128;

/// Handshakes of TLS that a worker has under way. More wait; places bound them all.
const HANDSHAKES: usize = 10_000;

/// What a worker's server reads its connections from.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Connection>>>>;

/// The running workers. Dropping them cuts what is still open.
pub struct Workers {
    workers: Vec<Worker>,
    /// Tells the workers to drain; its end tells them to end.
    stop: watch::Sender<bool>,
    /// Ends when the last worker has.
    ended: mpsc::UnboundedReceiver<()>,
    places: Arc<Semaphore>,
}

struct Worker {
    connections: mpsc::Sender<Accepted>,
    load: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` workers, each running the server that `serve` makes from its connections and
    /// the signal to drain. With `tls`, all clients must speak it.
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn start<F, S>(
        count: usize,
        max_connections: usize,
        tls: Option<&Tls>,
        serve: F,
    ) -> io::Result<Self>
    where
        F: Fn(Incoming, watch::Receiver<bool>) -> S + Clone + Send + 'static,
        S: Future<Output = ()>,
    {
        let (stop, stopped) = watch::channel(false);
        let (end, ended) = mpsc::unbounded_channel();
        let workers = (0..count)
            .map(|index| {
                let (serve, stopped) = (serve.clone(), stopped.clone());
                Worker::start(index, tls.cloned(), serve, stopped, end.clone())
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            workers,
            stop,
            ended,
            places: Arc::new(Semaphore::new(max_connections)),
        })
    }

    /// Reads how many connections each worker has open.
    pub fn loads(&self) -> Box<dyn Fn() -> Vec<usize> + Send + Sync> {
        let loads: Vec<_> = self
            .workers
            .iter()
            .map(|worker| worker.load.clone())
            .collect();
        Box::new(move || {
            loads
                .iter()
                .map(|load| load.load(Ordering::Relaxed))
                .collect()
        })
    }

    /// Accepts connections and gives each to the worker with the fewest; runs until dropped.
    ///
    /// At the bound it stops accepting: clients wait in the listener's backlog.
    ///
    /// # Errors
    /// When a worker has ended, which only a fault can make.
    pub async fn accept(&self, listener: &TcpListener) -> Result<(), WorkerGone> {
        loop {
            let place = self.places.clone().acquire_owned().await;
            let place = place.expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => self.assign(stream, place).await?,
                Err(error) => {
                    // Of this connection (the client is gone) or of the process (no descriptors
                    // left); either passes, but not by trying again at once.
                    debug!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    /// Lets every worker finish its calls, within `deadline`. Whether all did; if not, call again
    /// to wait longer.
    pub async fn drain(&mut self, deadline: Duration) -> bool {
        self.stop.send_replace(true);
        let all = async { while self.ended.recv().await.is_some() {} };
        tokio::time::timeout(deadline, all).await.is_ok()
    }

    async fn assign(
        &self,
        stream: TcpStream,
        place: OwnedSemaphorePermit,
    ) -> Result<(), WorkerGone> {
        // Small writes go out at once: most answers are one.
        let ready = stream.set_nodelay(true).and_then(|()| stream.into_std());
        let stream = match ready {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%error, "the client went away while connecting");
                return Ok(());
            }
        };
        let worker = self
            .workers
            .iter()
            .min_by_key(|worker| worker.load.load(Ordering::Relaxed));
        let worker = worker.ok_or(WorkerGone)?;
        let accepted = Accepted {
            stream,
            share: Share::of(&worker.load),
            place,
        };
        worker
            .connections
            .send(accepted)
            .await
            .map_err(|_| WorkerGone)
    }
}

impl Worker {
    fn start<F, S>(
        index: usize,
        tls: Option<Tls>,
        serve: F,
        stop: watch::Receiver<bool>,
        ended: mpsc::UnboundedSender<()>,
    ) -> io::Result<Self>
    where
        F: FnOnce(Incoming, watch::Receiver<bool>) -> S + Send + 'static,
        S: Future<Output = ()>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (connections, accepted) = mpsc::channel(BACKLOG);
        let mut abandoned = stop.clone();
        let work = move || {
            let accepted = ReceiverStream::new(accepted);
            let incoming: Incoming = match tls {
                None => Box::pin(accepted.map(Connection::take)),
                Some(tls) => Box::pin(
                    accepted
                        .map(move |accepted| Connection::take_over_tls(accepted, tls.clone()))
                        .buffer_unordered(HANDSHAKES)
                        // An error would end the server: it is of one client only.
                        .filter_map(async |shaken| {
                            let debug = |error: &_| debug!(%error, "no TLS with a client");
                            shaken.inspect_err(debug).ok().map(Ok)
                        }),
                ),
            };
            runtime.block_on(async {
                tokio::select! {
                    () = serve(incoming, stop) => {}
                    // Never true: only the sender's end completes it.
                    _ = abandoned.wait_for(|_| false) => {}
                }
            });
            // Not by dropping it: that would wait for hashes under way.
            runtime.shutdown_background();
            // An error means that nobody waits for the end.
            let _ = ended.send(());
        };
        thread::Builder::new()
            .name(format!("serve-{index}"))
            .spawn(work)?;
        Ok(Self {
            connections,
            load: Arc::default(),
        })
    }
}

/// A worker's server has ended while it should serve.
#[derive(Debug, thiserror::Error)]
#[error("a worker of the server has ended")]
pub struct WorkerGone;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_of_connections_is_spread_evenly() {
        let workers = Workers::start(2, 100, None, |incoming, mut stop| async move {
            // Takes none of them.
            let _ = stop.wait_for(|stop| *stop).await;
            drop(incoming);
        });
        let workers = workers.expect("started");
        let loads = || {
            workers
                .workers
                .iter()
                .map(|w| w.load.load(Ordering::Relaxed))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let connect = async {
            let mut open = Vec::new();
            for _ in 0..8 {
                open.push(TcpStream::connect(address).await.expect("connected"));
            }
            while loads().sum::<usize>() < 8 {
                tokio::task::yield_now().await;
            }
            open
        };
        tokio::select! {
            gone = workers.accept(&listener) => gone.expect("the workers run"),
            open = tokio::time::timeout(Duration::from_secs(10), connect) => {
                open.expect("all were given to a worker");
            }
        }
        assert_eq!(loads().collect::<Vec<_>>(), [4, 4]);
    }
}
