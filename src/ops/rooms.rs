//! What the rooms say of themselves when they are asked.

use std::{fmt, sync::Arc, time::Duration};

use chrono::Utc;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use crate::{
    auth::{Auth, Trust},
    clock::BootTime,
    store::Store,
    tasks::{DeliveryStatus, MailStatus, UpkeepStatus},
    usage::Usage,
};

/// Reads the rooms at every scrape, so that nothing has to be kept in step.
pub struct Rooms {
    pub auth: Auth,
    pub usage: Usage,
    pub store: Store,
    pub upkeep: Arc<UpkeepStatus>,
    pub delivery: Arc<DeliveryStatus>,
    pub mails: Arc<MailStatus>,
    /// Open connections of each thread that serves.
    pub connections: Box<dyn Fn() -> Vec<usize> + Send + Sync>,
}

impl fmt::Debug for Rooms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rooms").finish_non_exhaustive()
    }
}

impl Collector for Rooms {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counters = self.auth.counters();
        let memory = self.auth.memory();
        let freshness = self.auth.freshness();
        let now = BootTime::now();
        let trust = freshness.trust(now);
        let pool = self.store.pool_status();
        let mut out = Out(&mut encoder);

        out.counters(
            "credential_lookups",
            "Access tokens and API keys asked about: those that memory alone found good, and the others",
            "result",
            &[("hit", counters.hits.get()), ("miss", counters.misses.get())],
        )?;
        out.counter(
            "credential_reads",
            "Sessions, API keys and service keys read from the database",
            counters.reads.get(),
        )?;
        out.counter(
            "outage_answers",
            "Answers from memory because the database was away",
            counters.outage_answers.get(),
        )?;
        out.gauge(
            "credential_entries",
            "Credentials in memory",
            memory.entries,
        )?;
        out.gauge(
            "credential_bytes",
            "Memory of credentials and of what is known about them, estimated",
            memory.bytes,
        )?;
        out.gauge(
            "credential_bytes_limit",
            "Most that it may be",
            memory.bytes_limit,
        )?;
        out.counters(
            "changes",
            "Changes applied: those of all replicas as they are heard of, and those made here at once",
            "kind",
            &[
                ("user", counters.user_changes.get()),
                ("service", counters.service_changes.get()),
                ("flush", counters.flushes.get()),
            ],
        )?;
        let ledger = self.usage.counters();
        out.counters(
            "usage_events",
            "Usage events by what became of them, but for those that were refused",
            "outcome",
            &[
                ("recorded", ledger.recorded.get()),
                ("duplicate", ledger.duplicates.get()),
                ("conflict", ledger.conflicts.get()),
            ],
        )?;
        out.counter(
            "usage_batches",
            "Statements that booked them, those that failed too",
            ledger.batches.get(),
        )?;
        out.counters(
            "reservations",
            "Answers to those who asked to reserve, or looked: held, admitted beyond the limit while the database was away, denied, too many a minute, too large or too many at a time",
            "outcome",
            &[
                ("held", ledger.held.get()),
                ("beyond_limit", ledger.beyond_limit.get()),
                ("denied", ledger.denied.get()),
                ("rate_limited", ledger.rate_limited.get()),
                ("oversized", ledger.oversized.get()),
            ],
        )?;
        out.counters(
            "reservation_commits",
            "Commits of reservations: those taken while the database was away, and those that came after the reservation had expired",
            "kind",
            &[
                ("accepted", ledger.accepted.get()),
                ("late", ledger.late.get()),
            ],
        )?;
        let (waiting, writing) = self.usage.backlog();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        out.gauges(
            "usage_backlog",
            "Usage events that wait to be booked, and those that are being booked",
            "state",
            &[("waiting", count(waiting)), ("writing", count(writing))],
        )?;
        out.gauge(
            "reservation_commits_waiting",
            "Commits taken while the database was away that are not booked yet",
            count(self.usage.accepted_commits()),
        )?;
        let is = |state| u64::from(trust == state);
        out.gauges(
            "change_feed_state",
            "1 for the present state: live (answers from memory), stale (from the database), lost (not even from memory in an outage)",
            "state",
            &[
                ("live", is(Trust::Live)),
                ("stale", is(Trust::Stale)),
                ("lost", is(Trust::Lost)),
            ],
        )?;
        out.seconds(
            "change_feed_age_seconds",
            "Since the newest heartbeat that came back was sent",
            freshness
                .silence(now)
                .map_or(f64::INFINITY, |silence| silence.as_secs_f64()),
        )?;
        self.encode_upkeep(&mut out)?;
        self.encode_delivery(&mut out)?;
        self.encode_mails(&mut out)?;
        out.gauges(
            "pool_connections",
            "Connections to the database",
            "state",
            &[
                ("idle", count(pool.available)),
                ("used", count(pool.size.saturating_sub(pool.available))),
            ],
        )?;
        out.gauge(
            "pool_waiting",
            "Calls that wait for a connection",
            count(pool.waiting),
        )?;
        out.gauge("pool_limit", "Most connections", count(pool.max_size))?;
        let open = (self.connections)();
        let names: Vec<_> = (0..open.len()).map(|index| index.to_string()).collect();
        let open: Vec<_> = names
            .iter()
            .map(String::as_str)
            .zip(open.into_iter().map(count))
            .collect();
        out.gauges(
            "connections",
            "Open connections of each thread that serves",
            "thread",
            &open,
        )
    }
}

impl Rooms {
    fn encode_upkeep(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let upkeep = &self.upkeep;
        out.counters(
            "upkeep_runs",
            "Runs of upkeep: those that did all of it, and those that left something to the next",
            "result",
            &[
                ("succeeded", upkeep.succeeded.get()),
                ("failed", upkeep.failed.get()),
            ],
        )?;
        out.seconds(
            "upkeep_age_seconds",
            "Since upkeep last did all of it",
            upkeep
                .age()
                .as_ref()
                .map_or(f64::INFINITY, Duration::as_secs_f64),
        )?;
        out.gauge(
            "partitions_ahead",
            "Months after this one that have a partition for usage, as upkeep last saw it",
            upkeep.months_ahead(Utc::now()),
        )?;
        out.gauge(
            "partition_default_rows",
            "Rows that no monthly partition took, as upkeep last saw it",
            upkeep.default_rows(),
        )?;
        out.counter(
            "partitions_dropped",
            "Months of usage records dropped by retention",
            upkeep.dropped.get(),
        )
    }
}

impl Rooms {
    fn encode_delivery(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let delivery = &self.delivery;
        out.gauge(
            "outbox_pending",
            "Events of all replicas that are not delivered; 10,000 stand for more",
            delivery.backlog.pending(),
        )?;
        out.seconds(
            "outbox_oldest_seconds",
            "Age of the oldest event that is not delivered, 0 without one",
            delivery.backlog.oldest().as_secs_f64(),
        )?;
        out.counters(
            "webhook_attempts",
            "Attempts to post an event by what became of them",
            "result",
            &[
                ("delivered", delivery.delivered.get()),
                ("failed", delivery.failed.get()),
            ],
        )
    }
}

impl Rooms {
    fn encode_mails(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let mails = &self.mails;
        out.gauge(
            "mail_pending",
            "Mails of all replicas that are not sent; 10,000 stand for more",
            mails.backlog.pending(),
        )?;
        out.seconds(
            "mail_oldest_seconds",
            "Age of the oldest mail that is not sent, 0 without one",
            mails.backlog.oldest().as_secs_f64(),
        )?;
        out.counters(
            "mail_attempts",
            "Attempts to send a mail by what became of them; dropped: not wanted any more, or for nobody",
            "result",
            &[
                ("delivered", mails.delivered.get()),
                ("failed", mails.failed.get()),
                ("refused", mails.refused.get()),
                ("dropped", mails.dropped.get()),
            ],
        )
    }
}

/// Writes metrics of values that are already there.
struct Out<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Out<'_, '_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        let encoder = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode(encoder)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: &[(&str, u64)],
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (of, value) in values {
            let labels = [(label, *of)];
            ConstCounter::new(*value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let encoder = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        gauge.encode(encoder)
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: &[(&str, u64)],
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (of, value) in values {
            let labels = [(label, *of)];
            let value = i64::try_from(*value).unwrap_or(i64::MAX);
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let encoder = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(encoder)
    }
}
