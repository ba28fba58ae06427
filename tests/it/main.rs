//! The integration tests: the real server, over real gRPC, on a real Postgres.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed and says where"
)]

mod access;
mod auth;
mod contract;
mod descriptor;
mod docs;
mod freshness;
mod gateway;
mod harness;
mod ops;
mod outage;
mod process;
mod revocation;
mod rooms;
mod schema;
mod transport;
mod upgrade;
mod usage;
mod watch;
mod webhook;
