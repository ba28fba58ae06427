use chrono::{DateTime, Datelike as _, TimeDelta, Utc};

use super::{ModelName, Period, UsageTotals, UserId};

/// The smallest step of a time of ours.
const TICK: TimeDelta = TimeDelta::microseconds(1);

/// From `start` on, before `end`. Holds nothing unless `start` is before `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeRange {
    pub start: DateTime<Utc>,
    pub end: DateTime<Utc>,
}

impl TimeRange {
    /// The month of its first instant.
    pub fn first_month(self) -> Period {
        Period::containing(self.start)
    }

    /// The month of its last instant.
    pub fn last_month(self) -> Period {
        Period::containing(self.end - TICK)
    }

    /// Whether it begins and ends with a month.
    pub fn is_whole_months(self) -> bool {
        self.first_month().start() == self.start && self.last_month().end() == self.end
    }
}

/// Which booked events are meant: those for which everything holds that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsageFilter {
    pub period: Option<Period>,
    /// From this time on.
    pub start: Option<DateTime<Utc>>,
    /// Before this time.
    pub end: Option<DateTime<Utc>>,
    pub model: Option<ModelName>,
}

impl UsageFilter {
    /// Whether it asks for times.
    pub fn is_timed(&self) -> bool {
        self.period.is_some() || self.start.is_some() || self.end.is_some()
    }

    /// The times that are left; without bounds from 1970 to 9999, the times that can be told.
    pub fn range(&self) -> TimeRange {
        let first = DateTime::UNIX_EPOCH;
        let beyond = DateTime::from_timestamp(253_402_300_800, 0).expect("the year 10000 is known");
        let starts = [self.start, self.period.map(Period::start)];
        let ends = [self.end, self.period.map(Period::end)];
        TimeRange {
            start: starts.into_iter().flatten().fold(first, DateTime::max),
            end: ends.into_iter().flatten().fold(beyond, DateTime::min),
        }
    }
}

/// What sums over time are cut into. Hours, days and months are those of UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    Hour,
    Day,
    Month,
}

impl Interval {
    /// Where the interval that holds `instant` begins.
    pub fn start_of(self, instant: DateTime<Utc>) -> DateTime<Utc> {
        let since = |secs: i64| {
            let over = TimeDelta::seconds(instant.timestamp().rem_euclid(secs));
            let nanos = TimeDelta::nanoseconds(instant.timestamp_subsec_nanos().into());
            instant - over - nanos
        };
        match self {
            Self::Hour => since(60 * 60),
            Self::Day => since(24 * 60 * 60),
            Self::Month => Period::containing(instant).start(),
        }
    }

    /// Where the interval after the one that begins at `start` begins.
    pub fn next(self, start: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::Hour => start + TimeDelta::hours(1),
            Self::Day => start + TimeDelta::days(1),
            Self::Month => Period::containing(start).end(),
        }
    }

    /// How many intervals a range touches.
    pub fn count(self, range: TimeRange) -> i64 {
        if range.start >= range.end {
            return 0;
        }
        let (first, last) = (self.start_of(range.start), self.start_of(range.end - TICK));
        let months = |at: DateTime<Utc>| i64::from(at.year()) * 12 + i64::from(at.month0());
        1 + match self {
            Self::Hour => (last - first).num_hours(),
            Self::Day => (last - first).num_days(),
            Self::Month => months(last) - months(first),
        }
    }

    /// Where each interval that a range touches begins.
    pub fn starts(self, range: TimeRange) -> impl Iterator<Item = DateTime<Utc>> {
        std::iter::successors(Some(self.start_of(range.start)), move |start| {
            Some(self.next(*start))
        })
        .take_while(move |start| *start < range.end)
    }
}

/// What is summed apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsageGrouping {
    None,
    Model,
    /// By the value of the label of this key.
    Label(String),
}

/// A group of events.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UsageGroup {
    All,
    /// The model, or the value of the label.
    Named(String),
    /// Those without the label.
    Unlabeled,
    /// All groups but the largest.
    Other,
}

/// Where sums are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageSource {
    Records,
    /// The sums of months: for whole months, and not by label.
    Months,
}

/// Which sums are wanted.
#[derive(Clone, Debug)]
pub struct UsageCells {
    pub user_id: UserId,
    pub range: TimeRange,
    pub interval: Interval,
    pub grouping: UsageGrouping,
    pub source: UsageSource,
    pub model: Option<ModelName>,
    /// How many groups are told apart, those with the most tokens.
    pub max_groups: i64,
}

/// What a group used in an interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageCell {
    /// Where the interval begins.
    pub start: DateTime<Utc>,
    pub group: UsageGroup,
    /// 1 is the group with the most tokens.
    pub rank: i64,
    pub totals: UsageTotals,
}

/// What a month's report is broken down by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportBy {
    Model,
    User,
    Day,
}

/// A line of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportLine {
    /// The model, the username or the id of a user who is no more, or the day; `None` for all that
    /// have no line of their own.
    pub name: Option<String>,
    /// How many models, users or days it is of.
    pub members: i64,
    pub totals: UsageTotals,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(secs: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(secs, 0).expect("in range")
    }

    #[test]
    fn filters_hold_together() {
        let period: Period = "2026-02".parse().expect("valid");
        let inside = period.start() + TimeDelta::days(3);
        let filter = UsageFilter {
            period: Some(period),
            start: Some(inside),
            end: Some(period.end() + TimeDelta::days(3)),
            model: None,
        };
        let range = filter.range();
        assert_eq!((range.start, range.end), (inside, period.end()));
        let all = UsageFilter::default().range();
        assert_eq!(all.last_month().to_string(), "9999-12");
        assert_eq!(all.first_month().to_string(), "1970-01");
    }

    proptest! {
        #[test]
        fn intervals_cover_the_range_without_gap_or_overlap(
            start in 0_i64..4_000_000_000,
            secs in 1_i64..4_000_000,
            interval in prop_oneof![
                Just(Interval::Hour), Just(Interval::Day), Just(Interval::Month)
            ],
        ) {
            let range = TimeRange { start: at(start), end: at(start + secs) };
            let starts: Vec<_> = interval.starts(range).collect();
            prop_assert_eq!(starts.len() as i64, interval.count(range));
            prop_assert!(starts[0] <= range.start && range.start < interval.next(starts[0]));
            let last = *starts.last().expect("one at least");
            prop_assert!(last < range.end && range.end <= interval.next(last));
            for pair in starts.windows(2) {
                prop_assert_eq!(interval.next(pair[0]), pair[1]);
                prop_assert_eq!(interval.start_of(pair[1] - TICK), pair[0]);
            }
        }
    }
}
