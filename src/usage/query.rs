//! Usage over time: what may be asked, and the series that answer it.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};

use super::Usage;
use crate::{
    error::Result,
    model::{
        Interval, ModelName, TimeRange, TokenCounts, UsageCell, UsageCells, UsageGroup,
        UsageGrouping, UsageSource, UsageTotals, UserId, Violation,
    },
};

/// Intervals of an answer.
const MAX_INTERVALS: i64 = 1000;

/// Days whose records are read.
const MAX_DAYS: i64 = 366;

/// Groups that have a series of their own, when nothing is said and at most.
const DEFAULT_GROUPS: i64 = 20;
const MAX_GROUPS: i64 = 100;

/// Groups times intervals: an answer of some 3 MB, below the 4 MB that clients take by default.
const MAX_CELLS: i64 = 30_000;

/// What makes a series of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupBy {
    Nothing,
    Model,
    Dimension,
    /// The value of the label of this key.
    Label(String),
}

/// A question within its bounds.
#[derive(Clone, Debug)]
pub struct UsageQuery {
    range: TimeRange,
    interval: Interval,
    group_by: GroupBy,
    model: Option<ModelName>,
    max_groups: i64,
}

/// The answer to a question.
#[derive(Clone, Debug)]
pub struct UsageSeriesSet {
    pub range: TimeRange,
    pub series: Vec<UsageSeries>,
}

/// The usage of a group, with every interval of the range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageSeries {
    pub group: UsageGroup,
    pub totals: UsageTotals,
    pub buckets: Vec<(DateTime<Utc>, UsageTotals)>,
}

impl UsageQuery {
    pub fn new(
        range: TimeRange,
        interval: Interval,
        group_by: GroupBy,
        model: Option<ModelName>,
        max_groups: i64,
    ) -> Self {
        Self {
            range,
            interval,
            group_by,
            model,
            max_groups,
        }
    }

    /// The range that is meant by these bounds: without them the last 24 hours, 30 days or 12 months,
    /// the current interval included.
    ///
    /// # Errors
    /// What is wrong with the start: everything, seen from the end.
    pub fn range(
        start: Option<DateTime<Utc>>,
        end: Option<DateTime<Utc>>,
        interval: Interval,
        group_by: &GroupBy,
        now: DateTime<Utc>,
    ) -> Result<TimeRange, Violation> {
        let end = end.unwrap_or_else(|| interval.next(interval.start_of(now)));
        let start = start.unwrap_or_else(|| usual_start(interval, end));
        let range = TimeRange { start, end };
        if start >= end {
            return Err("must be before end_time".into());
        }
        if interval.count(range) > MAX_INTERVALS {
            return Err(
                format!("must be at most {MAX_INTERVALS} intervals before end_time").into(),
            );
        }
        let reads_records = source(range, interval, group_by) == UsageSource::Records;
        if reads_records && end - start > TimeDelta::days(MAX_DAYS) {
            return Err(format!(
                "must be at most {MAX_DAYS} days before end_time, unless by whole months"
            )
            .into());
        }
        Ok(range)
    }

    /// How many groups have a series of their own; zero means the usual number.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn max_groups(asked: i32, range: TimeRange, interval: Interval) -> Result<i64, Violation> {
        let most = MAX_GROUPS.min(MAX_CELLS / interval.count(range).max(1));
        match i64::from(asked) {
            0 => Ok(DEFAULT_GROUPS),
            groups if (1..=most).contains(&groups) => Ok(groups),
            _ => Err(format!("must be 0 to {most}, with so many intervals").into()),
        }
    }
}

impl Usage {
    /// A user's usage over time.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn query(&self, user_id: UserId, query: UsageQuery) -> Result<UsageSeriesSet> {
        let source = source(query.range, query.interval, &query.group_by);
        let grouping = match &query.group_by {
            GroupBy::Nothing | GroupBy::Dimension => UsageGrouping::None,
            GroupBy::Model => UsageGrouping::Model,
            GroupBy::Label(key) => UsageGrouping::Label(key.clone()),
        };
        let wanted = UsageCells {
            user_id,
            range: query.range,
            interval: query.interval,
            grouping,
            source,
            model: query.model,
            max_groups: query.max_groups,
        };
        let cells = self.store.usage_cells(&wanted).await?;
        let series = series(cells, query.range, query.interval, &query.group_by);
        Ok(UsageSeriesSet {
            range: query.range,
            series,
        })
    }
}

fn usual_start(interval: Interval, end: DateTime<Utc>) -> DateTime<Utc> {
    let intervals = match interval {
        Interval::Hour => 24,
        Interval::Day => 30,
        Interval::Month => 12,
    };
    // One that has only begun is one of them.
    let mut start = end;
    for _ in 0..intervals {
        start = interval.start_of(start - TimeDelta::microseconds(1));
    }
    start
}

/// Where an answer is read from: sums are kept of months and models.
fn source(range: TimeRange, interval: Interval, group_by: &GroupBy) -> UsageSource {
    let is_summed = !matches!(group_by, GroupBy::Label(_));
    if interval == Interval::Month && is_summed && range.is_whole_months() {
        UsageSource::Months
    } else {
        UsageSource::Records
    }
}

/// Makes series of cells: the largest group first, gaps filled.
fn series(
    cells: Vec<UsageCell>,
    range: TimeRange,
    interval: Interval,
    group_by: &GroupBy,
) -> Vec<UsageSeries> {
    // By rank: the order of the answer.
    let mut groups: BTreeMap<(i64, UsageGroup), BTreeMap<DateTime<Utc>, UsageTotals>> =
        BTreeMap::new();
    if matches!(group_by, GroupBy::Nothing | GroupBy::Dimension) {
        groups.insert((1, UsageGroup::All), BTreeMap::new());
    }
    for cell in cells {
        let group = groups.entry((cell.rank, cell.group)).or_default();
        group.insert(cell.start, cell.totals);
    }
    let filled = groups.into_iter().map(|((_, group), used)| {
        let bucket = |start| (start, used.get(&start).copied().unwrap_or_default());
        let buckets: Vec<_> = interval.starts(range).map(bucket).collect();
        UsageSeries {
            group,
            totals: buckets.iter().map(|(_, totals)| *totals).sum(),
            buckets,
        }
    });
    match group_by {
        GroupBy::Dimension => filled.flat_map(|all| dimensions(&all)).collect(),
        _ => filled.collect(),
    }
}

/// Finds a dimension among the others.
type Dimension = fn(&mut TokenCounts) -> &mut i64;

const DIMENSIONS: [(&str, Dimension); 5] = [
    ("input", |tokens| &mut tokens.input),
    ("output", |tokens| &mut tokens.output),
    ("cached_input", |tokens| &mut tokens.cached_input),
    ("cache_write", |tokens| &mut tokens.cache_write),
    ("reasoning", |tokens| &mut tokens.reasoning),
];

/// One series for each dimension.
fn dimensions(all: &UsageSeries) -> Vec<UsageSeries> {
    let only = |(name, of): (&str, Dimension)| {
        let keep = |mut totals: UsageTotals| {
            let mut tokens = TokenCounts::default();
            *of(&mut tokens) = *of(&mut totals.tokens);
            UsageTotals { tokens, ..totals }
        };
        let buckets = all.buckets.iter();
        UsageSeries {
            group: UsageGroup::Named(name.to_owned()),
            totals: keep(all.totals),
            buckets: buckets.map(|(start, used)| (*start, keep(*used))).collect(),
        }
    };
    DIMENSIONS.map(only).into()
}
