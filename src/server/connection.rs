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
    /// Open connections of the worker.
    pub(super) load: Arc<AtomicUsize>,
    /// One of the server's places.
    pub(super) place: OwnedSemaphorePermit,
}

/// A connection that counts against its worker's load and the server's bound while it is open.
pub struct Connection {
    stream: TcpStream,
    load: Arc<AtomicUsize>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Takes a connection into the current runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket.
    pub(super) fn take(accepted: Accepted) -> io::Result<Self> {
        let stream = TcpStream::from_std(accepted.stream)?;
        accepted.load.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            stream,
            load: accepted.load,
            _place: accepted.place,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
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
