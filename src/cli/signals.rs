//! Signals, caught.

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that ends the process no more.
pub(super) fn caught(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("cannot catch signals")
}

/// As shells have it of a command that SIGINT ended.
const TWICE_INTERRUPTED: i32 = 130;

/// SIGTERM and SIGINT, caught from the first moment on.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: caught(SignalKind::terminate())?,
            interrupt: caught(SignalKind::interrupt())?,
        })
    }

    pub(super) async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Whoever asks once more does not wait: for the database, or for more of standard input.
    pub(super) async fn end_at_next(mut self) {
        self.received().await;
        std::process::exit(TWICE_INTERRUPTED);
    }
}
