//! Sums over time: one statement for every question.

use chrono::{DateTime, Utc};
use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Integer, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;

use super::{
    Store,
    usage::{SumsRow, push_events_of},
};
use crate::{
    error::{Error, Result},
    model::{Interval, UsageCell, UsageCells, UsageGroup, UsageGrouping, UsageSource},
};

/// What [`CellsQuery`] says of a row's group.
const NAMED: i32 = 0;
const UNLABELED: i32 = 1;
const OTHER: i32 = 2;

impl Store {
    /// What each group used in each interval; nothing where nothing was used.
    ///
    /// The largest `max_groups` groups are told apart, over the whole range; the others are one.
    ///
    /// # Errors
    /// `Unavailable`, also when there is too much to read in time
    pub async fn usage_cells(&self, wanted: &UsageCells) -> Result<Vec<UsageCell>> {
        let mut conn = match wanted.source {
            UsageSource::Records => self.bulk_conn().await?,
            UsageSource::Months => self.conn().await?,
        };
        let rows: Vec<CellRow> = CellsQuery::of(wanted).load(&mut conn).await?;
        conn.done();
        rows.into_iter().map(|row| cell(row, wanted)).collect()
    }
}

/// Start of the interval, rank, kind and name of the group, sums.
type CellRow = (DateTime<Utc>, i64, i32, String, SumsRow);

fn cell((start, rank, kind, name, sums): CellRow, wanted: &UsageCells) -> Result<UsageCell> {
    let group = match kind {
        _ if wanted.grouping == UsageGrouping::None => UsageGroup::All,
        NAMED => UsageGroup::Named(name),
        UNLABELED => UsageGroup::Unlabeled,
        OTHER => UsageGroup::Other,
        kind => return Err(Error::internal(format!("a group of kind {kind}"))),
    };
    Ok(UsageCell {
        start,
        group,
        rank,
        totals: sums.into(),
    })
}

/// Sums, grouped and ranked by Postgres, so that no more comes back than is shown.
///
/// Months stand in it as well as times: they are what partitions are told apart by. All other
/// conditions are those of the index.
struct CellsQuery<'a> {
    wanted: &'a UsageCells,
    first_month: String,
    last_month: String,
}

impl<'a> CellsQuery<'a> {
    fn of(wanted: &'a UsageCells) -> Self {
        Self {
            wanted,
            first_month: wanted.range.first_month().to_string(),
            last_month: wanted.range.last_month().to_string(),
        }
    }

    /// The rows that are summed, and their months.
    fn push_rows<'b>(&'b self, out: &mut AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let wanted = self.wanted;
        let month = match wanted.source {
            UsageSource::Records => " FROM usage_records WHERE usage_month",
            UsageSource::Months => " FROM monthly_model_usage WHERE month",
        };
        out.push_sql(month);
        out.push_sql(" BETWEEN ");
        out.push_bind_param::<Text, _>(&self.first_month)?;
        out.push_sql(" AND ");
        out.push_bind_param::<Text, _>(&self.last_month)?;
        match wanted.source {
            UsageSource::Records => {
                push_events_of(&wanted.user_id.0, out)?;
                out.push_sql(" AND occurred_at >= ");
                out.push_bind_param::<Timestamptz, _>(&wanted.range.start)?;
                out.push_sql(" AND occurred_at < ");
                out.push_bind_param::<Timestamptz, _>(&wanted.range.end)?;
            }
            UsageSource::Months => {
                out.push_sql(" AND user_id = ");
                out.push_bind_param::<SqlUuid, _>(&wanted.user_id.0)?;
            }
        }
        if let Some(model) = &wanted.model {
            out.push_sql(" AND model = ");
            out.push_bind_param::<Text, _>(model.as_str())?;
        }
        Ok(())
    }
}

impl QueryFragment<Pg> for CellsQuery<'_> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        let wanted = self.wanted;
        // Planned for its values: an hour is read otherwise than a year.
        out.unsafe_to_cache_prepared();
        out.push_sql("WITH cells AS (SELECT ");
        out.push_sql(match (wanted.source, wanted.interval) {
            (UsageSource::Records, Interval::Hour) => "date_trunc('hour', occurred_at, 'UTC')",
            (UsageSource::Records, Interval::Day) => "date_trunc('day', occurred_at, 'UTC')",
            (UsageSource::Records, Interval::Month) => "date_trunc('month', occurred_at, 'UTC')",
            (UsageSource::Months, _) => "(month || '-01 00:00:00+00')::timestamptz",
        });
        out.push_sql(" AS start, ");
        match &wanted.grouping {
            UsageGrouping::None => out.push_sql("''"),
            UsageGrouping::Model => out.push_sql("model"),
            UsageGrouping::Label(key) => {
                out.push_sql("labels ->> ");
                out.push_bind_param::<Text, _>(key)?;
            }
        }
        // A name may be empty, so what has none needs a mark of its own.
        out.push_sql(
            " AS name, sum(input_tokens) AS input, sum(output_tokens) AS output,
                sum(cached_input_tokens) AS cached_input, sum(cache_write_tokens) AS cache_write,
                sum(reasoning_tokens) AS reasoning, ",
        );
        out.push_sql(match wanted.source {
            UsageSource::Records => "count(*)",
            UsageSource::Months => "sum(request_count)",
        });
        out.push_sql(" AS requests");
        self.push_rows(&mut out)?;
        out.push_sql(
            " GROUP BY 1, 2
            ), marked AS (
                SELECT name IS NULL AS is_unnamed, coalesce(name, '') AS name, start, input, output,
                    cached_input, cache_write, reasoning, requests
                FROM cells
            ), ranked AS (
                SELECT is_unnamed, name, least(row_number() OVER (
                    ORDER BY sum(input + output + cached_input + cache_write + reasoning) DESC,
                        is_unnamed, name COLLATE \"C\"
                ), 1 + ",
        );
        out.push_bind_param::<BigInt, _>(&wanted.max_groups)?;
        out.push_sql(
            ") AS rank
                FROM marked GROUP BY 1, 2
            )
            SELECT start, rank, CASE WHEN rank > ",
        );
        out.push_bind_param::<BigInt, _>(&wanted.max_groups)?;
        out.push_sql(" THEN 2 WHEN is_unnamed THEN 1 ELSE 0 END AS kind, CASE WHEN rank > ");
        out.push_bind_param::<BigInt, _>(&wanted.max_groups)?;
        out.push_sql(" THEN '' ELSE name END AS name");
        push_sums(&mut out);
        out.push_sql(
            "
            FROM marked JOIN ranked USING (is_unnamed, name)
            GROUP BY start, rank, 3, 4",
        );
        Ok(())
    }
}

/// The sums of what was used, or the largest number: together, sums may be beyond what a number holds, though
/// none of a user, month and model is.
pub(super) fn push_sums(out: &mut AstPass<'_, '_, Pg>) {
    for sum in [
        "input",
        "output",
        "cached_input",
        "cache_write",
        "reasoning",
        "requests",
    ] {
        out.push_sql(", least(sum(");
        out.push_sql(sum);
        out.push_sql("), 9223372036854775807)::bigint");
    }
}

impl QueryId for CellsQuery<'_> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl Query for CellsQuery<'_> {
    type SqlType = (
        Timestamptz,
        BigInt,
        Integer,
        Text,
        (BigInt, BigInt, BigInt, BigInt, BigInt, BigInt),
    );
}
