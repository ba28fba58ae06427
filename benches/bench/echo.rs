//! A service that does nothing: reads a `ValidateTokenRequest`, answers always the same. The measure
//! of what gRPC itself costs.
//!
//! Written as tonic would generate it. Compiled twice: into the benchmark, as the product is built,
//! and into `benches/echo`, as any tonic service is.

use std::{convert::Infallible, future};

use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{BoxFuture, Context, Poll, Service, http},
    server::{Grpc, NamedService, UnaryService},
};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct ValidateTokenRequest {
    #[prost(string, tag = "1")]
    token: String,
    #[prost(bool, tag = "2")]
    include_quota: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ValidateTokenResponse {
    #[prost(string, tag = "1")]
    user_id: String,
    #[prost(string, tag = "2")]
    username: String,
    #[prost(string, tag = "3")]
    tier: String,
    #[prost(int32, tag = "4")]
    role: i32,
    #[prost(string, tag = "5")]
    session_id: String,
    #[prost(message, optional, tag = "6")]
    issued_at: Option<Timestamp>,
    #[prost(message, optional, tag = "7")]
    expires_at: Option<Timestamp>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Timestamp {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

/// Makes a long answer about as long as that to a `ReserveQuota`, which carries a signed handle.
const LONG: usize = 150;

#[derive(Clone, Copy)]
pub(crate) struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "tollkeeper.auth.v1.AuthService";
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            "/tollkeeper.auth.v1.AuthService/ValidateToken" => Box::pin(async move {
                let mut grpc = Grpc::new(ProstCodec::default());
                Ok(grpc.unary(Answer, request).await)
            }),
            _ => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}

struct Answer;

impl UnaryService<ValidateTokenRequest> for Answer {
    type Response = ValidateTokenResponse;
    type Future = future::Ready<Result<Response<ValidateTokenResponse>, Status>>;

    fn call(&mut self, request: Request<ValidateTokenRequest>) -> Self::Future {
        let time = Timestamp {
            seconds: 1_800_000_000,
        };
        future::ready(Ok(Response::new(ValidateTokenResponse {
            user_id: "01934567-89ab-7def-8123-456789abcdef".to_owned(),
            username: match request.get_ref().include_quota {
                true => "p".repeat(LONG),
                false => "person-00042".to_owned(),
            },
            tier: "free".to_owned(),
            role: 1,
            session_id: "01934567-89ab-7def-8123-456789abcdee".to_owned(),
            issued_at: Some(time),
            expires_at: Some(time),
        })))
    }
}
