//! Background work. A task takes no input, is idempotent, and may run on every replica at once.

mod change_feed;
mod upkeep;

pub use change_feed::change_feed;
pub use upkeep::{make_partitions, upkeep};
