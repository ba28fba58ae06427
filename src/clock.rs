//! The clock that counts suspend.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A reading of the clock that also runs while the machine sleeps, in microseconds: a replica that was
/// suspended must not believe that no time has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(pub u64);

impl BootTime {
    pub fn now() -> Self {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;
        let reading = clock_gettime(CLOCK).expect("the clock of the system can be read");
        let micros = Duration::from(reading).as_micros();
        // Zero means never; no service starts in the first microsecond of a machine.
        Self(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// How long ago that was.
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    pub fn millis(self) -> u64 {
        self.0 / 1_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_runs() {
        let earlier = BootTime::now();
        assert!(BootTime::now() >= earlier && earlier > BootTime(0));
    }
}
