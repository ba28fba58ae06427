//! The integration tests: the real server, over real gRPC, on a real Postgres.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed and says where"
)]

mod auth;
mod harness;
mod outage;
mod process;
mod schema;
mod smoke;
mod usage;
