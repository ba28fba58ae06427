//! Background work. A task takes no input, is idempotent, and may run on every replica at once.

mod upkeep;

pub use upkeep::{make_partitions, upkeep};
