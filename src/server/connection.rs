use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::server::TlsStream;

use super::tls::Tls;
use crate::grpc::Peer;

/// What a client of HTTP/2 sends first (RFC 9113 §3.4), and how long it may take. Keepalive watches
/// the connection from then on; before, nothing else would end a silent one.
const PREFACE_BYTES: usize = 24;
const PREFACE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a client may take to agree on TLS, and to show its certificate.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// A connection on its way to a worker. It belongs to no runtime: a socket is registered with the
/// one that reads it.
pub(super) struct Accepted {
    pub(super) stream: std::net::TcpStream,
    pub(super) share: Share,
    /// One of the server's places.
    pub(super) place: OwnedSemaphorePermit,
}

/// A connection's part of its worker's load, from the moment it is given to the worker: were it
/// counted when the worker takes it, a burst would go to one worker as a whole.
pub(super) struct Share(Arc<AtomicUsize>);

impl Share {
    /// Adds one to the open connections of a worker, for as long as this lives.
    pub(super) fn of(load: &Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self(load.clone())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that counts against its worker's load and the server's bound while it is open.
pub struct Connection {
    stream: Stream,
    peer: Peer,
    _share: Share,
    _place: OwnedSemaphorePermit,
    /// Until the client has said that it speaks HTTP/2.
    opening: Option<Opening>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Delegates to the stream that it is.
macro_rules! with_stream {
    ($connection:expr, $stream:ident => $do:expr) => {
        match &mut $connection.stream {
            Stream::Plain(stream) => {
                let $stream = Pin::new(stream);
                $do
            }
            Stream::Tls(stream) => {
                let $stream = Pin::new(&mut **stream);
                $do
            }
        }
    };
}

struct Opening {
    missing_bytes: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Connection {
    /// Takes a connection into the current runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket.
    pub(super) fn take(accepted: Accepted) -> io::Result<Self> {
        let Accepted {
            stream,
            share,
            place,
        } = accepted;
        let stream = TcpStream::from_std(stream)?;
        let peer = Peer {
            address: stream.peer_addr().ok(),
            scopes: None,
        };
        Ok(Self::new(Stream::Plain(stream), peer, share, place))
    }

    /// [`Connection::take`] with a client that speaks TLS.
    ///
    /// # Errors
    /// When it does not, not in time, or shows a certificate that is not good.
    pub(super) async fn take_over_tls(accepted: Accepted, tls: Tls) -> io::Result<Self> {
        let Accepted {
            stream,
            share,
            place,
        } = accepted;
        let stream = TcpStream::from_std(stream)?;
        let address = stream.peer_addr().ok();
        let shaken = timeout(HANDSHAKE_DEADLINE, tls.accept(stream)).await;
        let (stream, scopes) = shaken.map_err(|_| io::ErrorKind::TimedOut)??;
        let peer = Peer { address, scopes };
        let stream = Stream::Tls(Box::new(stream));
        Ok(Self::new(stream, peer, share, place))
    }

    fn new(stream: Stream, peer: Peer, share: Share, place: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            peer,
            _share: share,
            _place: place,
            opening: Some(Opening {
                missing_bytes: PREFACE_BYTES,
                deadline: Box::pin(sleep(PREFACE_DEADLINE)),
            }),
        }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer.clone()
    }

    /// Notes how much a read brought; one of a silent client ends at the deadline.
    fn watch_opening(&mut self, cx: &mut Context<'_>, read: Option<usize>) -> io::Result<()> {
        let Some(opening) = &mut self.opening else {
            return Ok(());
        };
        opening.missing_bytes = opening
            .missing_bytes
            .saturating_sub(read.unwrap_or_default());
        if opening.missing_bytes == 0 {
            self.opening = None;
        } else if read.is_none() && opening.deadline.as_mut().poll(cx).is_ready() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = with_stream!(self, stream => stream.poll_read(cx, buffer));
        let read = polled.is_ready().then(|| buffer.filled().len() - before);
        self.watch_opening(cx, read)?;
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        with_stream!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_stream!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_stream!(self, stream => stream.poll_shutdown(cx))
    }

    /// HTTP/2 copies answers of up to a kilobyte into one buffer then, so that those that are ready
    /// together go out in one write. Vectored, each of more than 256 bytes takes a write of its own,
    /// which costs as much as a short call.
    fn is_write_vectored(&self) -> bool {
        false
    }
}
