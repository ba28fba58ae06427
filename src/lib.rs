//! Tollkeeper: who is calling, and how much they may still use.
//!
//! One gRPC service that internal services ask instead of parsing tokens, gateways ask before a
//! request spends tokens, and operators ask who used what.
//!
//! # Rooms
//!
//! | room | what for |
//! | --- | --- |
//! | [`clock`] | the clock that counts suspend |
//! | [`model`] | leaf types, valid by construction |
//! | [`error`] | what can go wrong |
//! | [`config`] | settings, and where each came from |
//! | [`store`] | Postgres; the only room with SQL |
//! | [`auth`] | people, programs, passwords, tokens, sessions |
//! | [`usage`] | the ledger, the quota, the tiers |
//! | [`proto`] | generated code, and what maps of gateways are made of |
//! | [`grpc`] | the edge: handlers, access, errors as statuses, health |
//! | [`ops`] | metrics and probes over HTTP |
//! | [`mail`] | what mails say, and how they leave |
//! | [`tasks`] | background work |
//! | [`server`] | the composition root |
//! | [`embedded`] | the private Postgres of the zero-configuration start |
//! | [`telemetry`] | logs |
//! | [`cli`] | the command line |
//!
//! Imports run one way, `grpc → auth, usage → store → model`; `tests/it/rooms.rs` holds it.

pub mod auth;
pub mod cli;
pub mod clock;
pub mod config;
pub mod embedded;
pub mod error;
pub mod grpc;
pub mod mail;
pub mod model;
pub mod ops;
pub mod proto;
pub mod server;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod usage;
pub mod webhook;
