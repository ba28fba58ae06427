use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
};
use tonic::transport::server::{Connected, TcpConnectInfo};

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
    stream: TcpStream,
    _share: Share,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Takes a connection into the current runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket.
    pub(super) fn take(accepted: Accepted) -> io::Result<Self> {
        Ok(Self {
            stream: TcpStream::from_std(accepted.stream)?,
            _share: accepted.share,
            _place: accepted.place,
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
