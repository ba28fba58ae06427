//! Quota in memory: leases, holds and what is decided about them. `docs/quota.md` says why it cannot
//! oversell.
//!
//! Pure: no I/O, and time comes in as numbers. A [`Book`] is what one replica knows of one shard of
//! users; [`operate`] is what Postgres' side decides while it holds the meter's lock;
//! [`Registration`] says until when a replica may admit.

mod book;
mod decision;
mod gcra;
mod hash;
mod hold;
mod meter;
mod registration;
#[cfg(test)]
mod simulation;

pub use book::{
    Answered, Ask, Begun, Book, Bounds, Ended, Mode, Outcome, Refusal, Reserved, Sight,
};
pub use decision::{Answer, Balance, Carried, LeaseRow, Operation, ReplicaRow, operate};
pub use gcra::{Gcra, Rate};
pub use hold::{Ending, Held, HoldId, Kind, RequestKey};
pub use meter::{Boot, MeterKey, ModelKey, Pace, Tokens};
pub use registration::{Heartbeat, Lasting, Registration, Standing};
