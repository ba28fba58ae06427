//! The gRPC edge: who may call, what the messages mean, how errors look.
//!
//! A handler converts the request, makes one call inward and converts the answer; the layers do the
//! rest. Nothing inward knows that it is called by gRPC.

mod access;
mod admin;
mod audit;
mod auth;
mod bearer;
mod call;
mod convert;
mod envoy;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod health;
mod importing;
mod mails;
mod memory;
mod metrics;
mod mfa;
mod peer;
mod people;
mod probe;
mod proxies;
mod quota;
mod reading;
mod recording;
mod request_id;
mod reservation;
mod status;
mod usage;
mod watch;
mod wire;

use tonic::service::{Routes, RoutesBuilder};

pub use access::{AccessLayer, Rules, RulesError};
pub use call::{CallEnd, CallLayer};
pub use envoy::Afterwards;
pub use memory::MemoryLayer;
pub use metrics::CallMetrics;
pub use peer::Peer;
pub use probe::probe;
pub use proxies::TrustedProxies;
pub use status::row_reason;

use crate::{
    auth::Auth,
    proto::{
        DESCRIPTOR_SET,
        envoy::service::{
            auth::v3::authorization_server::AuthorizationServer,
            ratelimit::v3::rate_limit_service_server::RateLimitServiceServer,
        },
        tollkeeper::{
            admin::v1::admin_service_server::AdminServiceServer,
            auth::v1::auth_service_server::AuthServiceServer,
            usage::v1::usage_service_server::UsageServiceServer,
        },
    },
    usage::Usage,
};

/// Every service of this server, health included and reflection by choice. What their calls leave
/// behind counts in `afterwards`.
///
/// # Errors
/// When the descriptor set cannot be read, which the build would have shown.
pub fn routes(
    auth: Auth,
    usage: Usage,
    health: tonic_health::server::HealthService,
    reflection: bool,
    max_request_bytes: usize,
    afterwards: Afterwards,
) -> Result<Routes, tonic_reflection::server::Error> {
    let max = max_request_bytes;
    let mut routes = RoutesBuilder::default();
    let handler = auth::Handler {
        auth: auth.clone(),
        usage: usage.clone(),
    };
    routes.add_service(AuthServiceServer::new(handler).max_decoding_message_size(max));
    let handler = usage::Handler {
        auth: auth.clone(),
        usage: usage.clone(),
    };
    routes.add_service(UsageServiceServer::new(handler).max_decoding_message_size(max));
    let handler = envoy::Handler {
        auth: auth.clone(),
        usage: usage.clone(),
        afterwards,
    };
    routes.add_service(AuthorizationServer::new(handler.clone()).max_decoding_message_size(max));
    routes.add_service(RateLimitServiceServer::new(handler).max_decoding_message_size(max));
    let handler = admin::Handler { auth, usage };
    routes.add_service(AdminServiceServer::new(handler).max_decoding_message_size(max));
    routes.add_service(tonic_health::pb::health_server::HealthServer::new(health));
    if reflection {
        // Python's clients speak the older version only.
        routes.add_service(reflection_builder().build_v1()?);
        routes.add_service(reflection_builder().build_v1alpha()?);
    }
    Ok(routes.routes())
}

fn reflection_builder() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // So that clients without our protos can read the details of errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
