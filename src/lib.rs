//! Tollkeeper: who is calling, and how much they may still use.

pub mod auth;
pub mod config;
pub mod error;
pub mod model;
pub mod proto;
pub mod store;
pub mod usage;
