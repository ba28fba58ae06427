//! What servers that are written as one would write them first have in common: tonic on its default
//! runtime, a pool of 16 connections, one RPC.

use std::{convert::Infallible, marker::PhantomData};

use anyhow::Context as _;
use diesel_async::{
    AsyncPgConnection,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod, deadpool::Pool,
    },
};
use tokio::net::TcpListener;
use tonic::{
    Status,
    body::Body,
    codegen::{BoxFuture, Context, Poll, Service, http},
    server::{Grpc, NamedService, UnaryService},
    transport::{Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;

use crate::process;

/// Of a team that has read what its pool defaults to.
const CONNECTIONS: usize = 16;

/// Tests no connection before it is used, in favour of who uses it.
pub(crate) fn pool(url: &str) -> anyhow::Result<Pool<AsyncPgConnection>> {
    let mut config = ManagerConfig::<AsyncPgConnection>::default();
    config.recycling_method = RecyclingMethod::Fast;
    let manager = AsyncDieselConnectionManager::new_with_config(url, config);
    Ok(Pool::builder(manager).max_size(CONNECTIONS).build()?)
}

/// Serves one RPC until standard input ends. `start` runs within the server's runtime.
pub(crate) fn serve<H, Q>(
    path: &'static str,
    start: impl AsyncFnOnce() -> anyhow::Result<H>,
) -> anyhow::Result<()>
where
    H: UnaryService<Q> + Clone + Send + Sync + 'static,
    H::Future: Send,
    H::Response: prost::Message + 'static,
    Q: prost::Message + Default + 'static,
{
    let runtime = tokio::runtime::Runtime::new()?;
    process::end_with_standard_input();
    runtime.block_on(async {
        let service = OneRpc {
            path,
            handler: start().await?,
            request: PhantomData,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming)
            .await
            .context("serving")
    })
}

/// A generated server without the RPCs that are not called.
struct OneRpc<H, Q> {
    path: &'static str,
    handler: H,
    request: PhantomData<fn(Q)>,
}

impl<H: Clone, Q> Clone for OneRpc<H, Q> {
    fn clone(&self) -> Self {
        Self {
            path: self.path,
            handler: self.handler.clone(),
            request: PhantomData,
        }
    }
}

impl<H, Q> NamedService for OneRpc<H, Q> {
    const NAME: &'static str = "tollkeeper.usage.v1.UsageService";
}

impl<H, Q> Service<http::Request<Body>> for OneRpc<H, Q>
where
    H: UnaryService<Q> + Clone + Send + Sync + 'static,
    H::Future: Send,
    H::Response: prost::Message + 'static,
    Q: prost::Message + Default + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (path, handler) = (self.path, self.handler.clone());
        Box::pin(async move {
            if request.uri().path() == path {
                let mut grpc = Grpc::new(ProstCodec::default());
                Ok(grpc.unary(handler, request).await)
            } else {
                Ok(Status::unimplemented("").into_http())
            }
        })
    }
}
