//! What every test starts from: a server of its own on a database of its own.
//!
//! ```ignore
//! let app = TestApp::spawn().await;
//! let user = app.user().tier("starter").create().await;
//! let session = app.login(&user).await;
//! ```

mod app;
mod blocker;
mod certificates;
mod client;
pub(crate) mod cluster;
mod edge;
mod mailbox;
mod plan;
mod proxy;
mod smtp;
mod user;
mod wait;

pub(crate) use app::{RunningServer, TestApp};
pub(crate) use blocker::Blocker;
pub(crate) use certificates::Authority;
pub(crate) use client::{Raw, login_through, reason, validate_through, with_bearer};
pub(crate) use edge::{Answer, Edge};
pub(crate) use mailbox::{Letter, Mailbox};
pub(crate) use proxy::Proxy;
pub(crate) use smtp::{Protection, SmtpServer};
pub(crate) use user::{PASSWORD, TestUser};
pub(crate) use wait::{eventually, hears_of_changes};
