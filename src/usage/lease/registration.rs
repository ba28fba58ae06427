//! Until when this replica may admit from its leases.

use super::meter::Boot;

/// How long a replica counts as alive, and how well clocks agree.
#[derive(Clone, Copy, Debug)]
pub struct Lasting {
    pub ttl_ms: u64,
    /// Holds up to this long need no heartbeat of their own.
    pub hold_ms: u64,
    /// The time between two heartbeats, generously.
    pub period_ms: u64,
    /// A clock loses or gains at most one part in this many, against Postgres'.
    pub drift_part: u64,
}

/// What a heartbeat states: from its transaction on the replica lives `ttl_ms`, and none of its holds
/// ends later than `holds_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The clock before it was sent.
    pub sent: Boot,
    pub ttl_ms: u64,
    pub holds_ms: u64,
}

/// What an admission has to know; read for each look at the book.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub now: Boot,
    pub fence: Boot,
    pub horizon: Boot,
}

/// A replica's place in the table of replicas, as far as answered heartbeats prove it.
#[derive(Clone, Copy, Debug)]
pub struct Registration {
    lasting: Lasting,
    fence: Boot,
    horizon: Boot,
    /// A hold that is wanted ends then.
    wanted: Boot,
}

impl Registration {
    /// Admits nothing before the first heartbeat is answered.
    pub fn new(lasting: Lasting) -> Self {
        Self {
            lasting,
            fence: Boot(0),
            horizon: Boot(0),
            wanted: Boot(0),
        }
    }

    /// Asks the next heartbeat for a horizon that lets a hold end at `until`.
    pub fn want_until(&mut self, until: Boot) {
        self.wanted = self.wanted.max(until);
    }

    /// The heartbeat to send at `now`. Longer than the standard only for a hold that is wanted: what
    /// holds have been given is within what earlier heartbeats promised, which Postgres never takes
    /// back.
    pub fn heartbeat(&self, now: Boot) -> Heartbeat {
        let Lasting {
            hold_ms, period_ms, ..
        } = self.lasting;
        let standard = hold_ms.saturating_add(period_ms.saturating_mul(2));
        let holds = standard.max(self.wanted.since(now));
        Heartbeat {
            sent: now,
            ttl_ms: self.lasting.ttl_ms,
            // Twice: once for what the clocks lose, once for what is taken off again.
            holds_ms: holds.saturating_add(self.drift(holds).saturating_mul(2)),
        }
    }

    /// Postgres has carried it out. Counts from before it was sent: the transaction came later.
    pub fn answered(&mut self, heartbeat: &Heartbeat) {
        let Heartbeat {
            sent,
            ttl_ms,
            holds_ms,
        } = *heartbeat;
        let fence = sent.plus(ttl_ms - self.drift(ttl_ms).min(ttl_ms));
        let horizon = sent.plus(holds_ms - self.drift(holds_ms).min(holds_ms));
        self.fence = self.fence.max(fence);
        self.horizon = self.horizon.max(horizon);
    }

    pub fn standing(&self, now: Boot) -> Standing {
        Standing {
            now,
            fence: self.fence,
            horizon: self.horizon,
        }
    }

    fn drift(&self, millis: u64) -> u64 {
        millis.div_ceil(self.lasting.drift_part.max(1))
    }
}

impl Standing {
    pub fn is_fenced(&self) -> bool {
        self.now >= self.fence
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_from_before_the_heartbeat_was_sent() {
        let mut registration = Registration::new(Lasting {
            ttl_ms: 10_000,
            hold_ms: 60_000,
            period_ms: 2_000,
            drift_part: 100,
        });
        assert!(registration.standing(Boot(1)).is_fenced());
        let heartbeat = registration.heartbeat(Boot(1_000));
        assert_eq!(heartbeat.holds_ms, 65_280);
        registration.answered(&heartbeat);
        assert!(!registration.standing(Boot(10_899)).is_fenced());
        assert!(registration.standing(Boot(10_900)).is_fenced());
        assert!(registration.standing(Boot(0)).horizon >= Boot(64_000));
        registration.want_until(Boot(500_000));
        let longer = registration.heartbeat(Boot(2_000));
        registration.answered(&longer);
        assert!(registration.standing(Boot(0)).horizon >= Boot(500_000));
        // An older answer that comes late takes nothing back.
        registration.answered(&heartbeat);
        assert!(registration.standing(Boot(0)).horizon >= Boot(500_000));
    }
}
