//! Requests per minute: the generic cell rate algorithm.

/// How often, and how many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    interval_ns: u64,
    burst: u64,
}

const MINUTE_NS: u64 = 60_000_000_000;

impl Rate {
    /// This replica's part of `limit` requests a minute: an equal one, rounded up, with a burst of as
    /// much. All together, in any `t` minutes: at most `part × replicas × (1 + t)`.
    ///
    /// `None` when nothing is allowed.
    pub fn per_minute(limit: u32, replicas: u32) -> Option<Self> {
        let part = u64::from(limit).div_ceil(u64::from(replicas.max(1)));
        (part > 0).then(|| Self {
            interval_ns: MINUTE_NS.div_ceil(part),
            burst: part,
        })
    }
}

/// One user's state: when the bucket will be full again, in nanoseconds of the replica's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gcra(u64);

impl Gcra {
    /// Admits one request.
    ///
    /// # Errors
    /// Says in how many nanoseconds to ask again. A refused request costs nothing.
    pub fn admit(&mut self, rate: Rate, now_ns: u64) -> Result<(), u64> {
        let full = self.0.max(now_ns);
        let depth = rate.interval_ns.saturating_mul(rate.burst - 1);
        let earliest = full.saturating_sub(depth);
        if earliest > now_ns {
            return Err(earliest - now_ns);
        }
        self.0 = full.saturating_add(rate.interval_ns);
        Ok(())
    }

    /// Whether it says no more than that of somebody who was never seen.
    pub fn is_fresh(self, now_ns: u64) -> bool {
        self.0 <= now_ns
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_then_one_an_interval() {
        let rate = Rate::per_minute(60, 2).expect("allowed");
        let mut state = Gcra::default();
        let now = 5 * MINUTE_NS;
        assert_eq!(
            (0..100).filter(|_| state.admit(rate, now).is_ok()).count(),
            30
        );
        let wait = state.admit(rate, now).expect_err("full");
        assert_eq!(wait, 2_000_000_000);
        assert!(state.admit(rate, now + wait - 1).is_err());
        assert!(state.admit(rate, now + wait).is_ok());
        assert_eq!(Rate::per_minute(0, 3), None);
    }

    proptest! {
        #[test]
        fn no_span_admits_more_than_the_burst_and_its_rate(
            limit in 1..200_u32, replicas in 1..5_u32,
            gaps in prop::collection::vec(0..3_000_000_000_u64, 1..200),
        ) {
            let rate = Rate::per_minute(limit, replicas).expect("allowed");
            let (mut state, mut now, mut admitted) = (Gcra::default(), 1, Vec::new());
            for gap in gaps {
                now += gap;
                if state.admit(rate, now).is_ok() {
                    admitted.push(now);
                }
            }
            for (i, first) in admitted.iter().enumerate() {
                for (j, last) in admitted.iter().enumerate().skip(i) {
                    let most = rate.burst + (last - first) / rate.interval_ns;
                    prop_assert!((j - i + 1) as u64 <= most);
                }
            }
        }
    }
}
