//! Quota in memory: leases, holds and what is decided about them. `docs/quota.md` says why it cannot
//! oversell.
//!
//! Pure: no I/O, and time comes in as numbers. A [`Book`] is what one replica knows of one shard of
//! users; [`operate`] is what Postgres' side decides while it holds the meter's lock;
//! [`Registration`] says until when a replica may admit.

mod book;
mod gcra;
mod hash;
mod hold;
mod meter;
mod meters;
mod registration;
#[cfg(test)]
mod simulation;
mod slots;

pub use book::{Answered, Ask, Begun, Book, Bounds, Ended, Mode, Outcome, Refusal, Reserved};
pub use gcra::{Gcra, Rate};
pub(super) use hash::Map;
pub use hold::{Held, RequestKey};
pub use meter::{Boot, MeterKey, ModelKey, Pace, Sight, Told};
pub use registration::{Heartbeat, Lasting, Registration, Standing};

pub use crate::model::{
    Answer, Balance, Carried, Ending, HoldId, Kind, LeaseRow, Operation, ReplicaRow, Tokens,
    operate,
};
