//! Tollkeeper: who is calling, and how much they may still use.

pub mod proto;
