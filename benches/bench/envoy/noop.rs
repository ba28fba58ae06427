//! What asking costs when nobody decides: reads what a gateway asks, answers always the same.
//!
//! The answers are encoded beforehand, as the real service gave them, so that they are as long and mean
//! as much work to the gateway.

use std::{convert::Infallible, future, marker::PhantomData};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{BufMut as _, Bytes};
use prost::Message;
use tokio::net::TcpListener;
use tollkeeper::{
    config::ServerSettings,
    proto::envoy::service::{auth::v3::CheckRequest, ratelimit::v3::RateLimitRequest},
    server::{self, Incoming, Workers},
};
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    codegen::{BoxFuture, Context, Poll, Service, http},
    server::{Grpc, NamedService, UnaryService},
    service::Routes,
};
use tonic_prost::ProstDecoder;

use crate::{cores, process};

/// Serves as the product serves, until standard input ends.
pub(crate) fn serve(check: &str, limit: &str) -> anyhow::Result<()> {
    let check = Noop::<CheckRequest>::of(check)?;
    let limit = Noop::<RateLimitRequest>::of(limit)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    process::end_with_standard_input();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let streams = ServerSettings::default().max_streams;
        let routes = Routes::new(check).add_service(limit).prepare();
        let workers = Workers::start(cores(), 10_000, None, move |incoming: Incoming, stop| {
            let routes = routes.clone();
            server::serve(incoming, streams, stop, move |_| routes.clone())
        })?;
        workers.accept(&listener).await?;
        Ok(())
    })
}

/// One RPC that takes such requests.
struct Noop<Q> {
    answer: Bytes,
    request: PhantomData<fn(Q)>,
}

impl<Q> Noop<Q> {
    fn of(answer: &str) -> anyhow::Result<Self> {
        Ok(Self {
            answer: STANDARD.decode(answer)?.into(),
            request: PhantomData,
        })
    }
}

impl<Q> Clone for Noop<Q> {
    fn clone(&self) -> Self {
        Self {
            answer: self.answer.clone(),
            request: PhantomData,
        }
    }
}

impl NamedService for Noop<CheckRequest> {
    const NAME: &'static str = "envoy.service.auth.v3.Authorization";
}

impl NamedService for Noop<RateLimitRequest> {
    const NAME: &'static str = "envoy.service.ratelimit.v3.RateLimitService";
}

impl<Q: Message + Default + 'static> Service<http::Request<Body>> for Noop<Q> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let noop = self.clone();
        Box::pin(async move {
            let mut grpc = Grpc::new(Prepared(PhantomData));
            Ok(grpc.unary(noop, request).await)
        })
    }
}

impl<Q> UnaryService<Q> for Noop<Q> {
    type Response = Bytes;
    type Future = future::Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, _request: Request<Q>) -> Self::Future {
        future::ready(Ok(Response::new(self.answer.clone())))
    }
}

/// Decodes what comes; what goes is encoded already.
struct Prepared<Q>(PhantomData<fn(Q)>);

impl<Q: Message + Default + 'static> Codec for Prepared<Q> {
    type Encode = Bytes;
    type Decode = Q;
    type Encoder = Verbatim;
    type Decoder = ProstDecoder<Q>;

    fn encoder(&mut self) -> Verbatim {
        Verbatim
    }

    fn decoder(&mut self) -> ProstDecoder<Q> {
        ProstDecoder::new(BufferSettings::default())
    }
}

struct Verbatim;

impl Encoder for Verbatim {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}
