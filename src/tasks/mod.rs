//! Background work. A task takes no input, is idempotent, and may run on every replica at once.

mod api_key_uses;
mod backlog;
mod change_feed;
mod delivery;
mod mailing;
mod upkeep;

pub use api_key_uses::{api_key_uses, last_api_key_uses};
pub use change_feed::change_feed;
pub use delivery::{Delivery, DeliveryStatus};
pub use mailing::{LastMails, MailStatus, Mailing};
pub use upkeep::{Retention, Upkeep, UpkeepStatus, make_partitions};
