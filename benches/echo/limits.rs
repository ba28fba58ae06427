//! A rate limit as one would write it first: counters in memory, nothing to look up, nobody to admit.
//! The messages are those of the Envoy API, as far as they are needed.

use std::{
    collections::HashMap,
    convert::Infallible,
    future,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex},
};

use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{BoxFuture, Context, Poll, Service, http},
    server::{Grpc, NamedService, UnaryService},
};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
struct RateLimitRequest {
    #[prost(message, repeated, tag = "2")]
    descriptors: Vec<Descriptor>,
    #[prost(uint32, tag = "3")]
    hits_addend: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Descriptor {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<Entry>,
    #[prost(message, optional, tag = "3")]
    hits_addend: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RateLimitResponse {
    #[prost(int32, tag = "1")]
    overall_code: i32,
    #[prost(message, repeated, tag = "2")]
    statuses: Vec<DescriptorStatus>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DescriptorStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(message, optional, tag = "2")]
    current_limit: Option<RateLimit>,
    #[prost(uint32, tag = "3")]
    limit_remaining: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RateLimit {
    #[prost(uint32, tag = "1")]
    requests_per_unit: u32,
    #[prost(int32, tag = "2")]
    unit: i32,
}

const OK: i32 = 1;
const OVER_LIMIT: i32 = 2;
const MONTH: i32 = 5;
/// Nobody reaches it here.
const LIMIT: u32 = u32::MAX;
/// So that threads seldom wait for each other.
const SHARDS: usize = 64;

/// What each descriptor has used.
#[derive(Clone)]
pub(crate) struct Limits(Arc<Counters>);

struct Counters {
    hasher: RandomState,
    shards: [Mutex<HashMap<String, u64>>; SHARDS],
}

impl Limits {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Counters {
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| Mutex::default()),
        }))
    }

    fn count(&self, descriptor: &Descriptor, hits: u64) -> DescriptorStatus {
        let mut key = String::with_capacity(64);
        for entry in &descriptor.entries {
            key.extend([&entry.key, "=", &entry.value, ";"]);
        }
        let Counters { hasher, shards } = &*self.0;
        let shard = hasher.hash_one(&key) as usize % SHARDS;
        let mut counters = shards[shard].lock().expect("nobody panics with it");
        let used = counters.entry(key).or_default();
        let code = match *used + hits <= u64::from(LIMIT) {
            true => OK,
            false => OVER_LIMIT,
        };
        if code == OK {
            *used += hits;
        }
        DescriptorStatus {
            code,
            current_limit: Some(RateLimit {
                requests_per_unit: LIMIT,
                unit: MONTH,
            }),
            limit_remaining: LIMIT - u32::try_from(*used).unwrap_or(LIMIT),
        }
    }
}

impl NamedService for Limits {
    const NAME: &'static str = "envoy.service.ratelimit.v3.RateLimitService";
}

impl Service<http::Request<Body>> for Limits {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let limits = self.clone();
        match request.uri().path() {
            "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit" => {
                Box::pin(async move {
                    let mut grpc = Grpc::new(ProstCodec::default());
                    Ok(grpc.unary(limits, request).await)
                })
            }
            _ => Box::pin(async { Ok(Status::unimplemented("").into_http()) }),
        }
    }
}

impl UnaryService<RateLimitRequest> for Limits {
    type Response = RateLimitResponse;
    type Future = future::Ready<Result<Response<RateLimitResponse>, Status>>;

    fn call(&mut self, request: Request<RateLimitRequest>) -> Self::Future {
        let request = request.into_inner();
        let of_all = u64::from(request.hits_addend.max(1));
        let descriptors = request.descriptors.iter();
        let statuses: Vec<_> = descriptors
            .map(|one| self.count(one, one.hits_addend.unwrap_or(of_all)))
            .collect();
        let over = statuses.iter().any(|status| status.code == OVER_LIMIT);
        future::ready(Ok(Response::new(RateLimitResponse {
            overall_code: if over { OVER_LIMIT } else { OK },
            statuses,
        })))
    }
}
