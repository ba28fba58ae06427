//! A month of all users, or of one, for the operator: not for calls, since it may read much.

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Text, Uuid as SqlUuid},
};
use diesel_async::RunQueryDsl;

use super::{
    Store,
    usage::{SumsRow, push_events_of},
    usage_cells::push_sums,
};
use crate::{
    error::Result,
    model::{Period, ReportBy, ReportLine, UserId},
};

impl Store {
    /// A month's usage, broken down; of all users or of one. Nothing for what used nothing.
    ///
    /// The `top` lines with the most tokens, largest first, and one for the others. Of days all, by
    /// date.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn usage_report(
        &self,
        period: Period,
        by: ReportBy,
        user_id: Option<UserId>,
        top: i64,
    ) -> Result<Vec<ReportLine>> {
        let top = match by {
            ReportBy::Day => i64::from(u8::MAX),
            ReportBy::Model | ReportBy::User => top,
        };
        let query = ReportQuery {
            month: period.to_string(),
            by,
            user_id,
            top,
        };
        let mut conn = self.conn().await?;
        let rows: Vec<(i64, String, i64, SumsRow)> = query.load(&mut conn).await?;
        let line = |(rank, name, members, sums): (i64, String, i64, SumsRow)| ReportLine {
            name: (rank <= top).then_some(name),
            members,
            totals: sums.into(),
        };
        Ok(rows.into_iter().map(line).collect())
    }
}

struct ReportQuery {
    month: String,
    by: ReportBy,
    user_id: Option<UserId>,
    top: i64,
}

impl QueryFragment<Pg> for ReportQuery {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.unsafe_to_cache_prepared();
        let (name, count, from) = match self.by {
            ReportBy::Model => (
                "model",
                "sum(request_count)",
                "monthly_model_usage WHERE month = ",
            ),
            ReportBy::User => (
                "coalesce((SELECT username FROM users WHERE id = user_id), user_id::text)",
                "sum(request_count)",
                "monthly_usage WHERE month = ",
            ),
            ReportBy::Day => (
                "to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
                "count(*)",
                "usage_records WHERE usage_month = ",
            ),
        };
        out.push_sql("WITH used AS (SELECT ");
        out.push_sql(name);
        out.push_sql(
            " AS name, sum(input_tokens) AS input, sum(output_tokens) AS output,
                sum(cached_input_tokens) AS cached_input, sum(cache_write_tokens) AS cache_write,
                sum(reasoning_tokens) AS reasoning, ",
        );
        out.push_sql(count);
        out.push_sql(" AS requests FROM ");
        out.push_sql(from);
        out.push_bind_param::<Text, _>(&self.month)?;
        match (&self.user_id, self.by) {
            (None, _) => {}
            (Some(user_id), ReportBy::Day) => push_events_of(&user_id.0, &mut out)?,
            (Some(user_id), ReportBy::Model | ReportBy::User) => {
                out.push_sql(" AND user_id = ");
                out.push_bind_param::<SqlUuid, _>(&user_id.0)?;
            }
        }
        out.push_sql(" GROUP BY 1), ranked AS (SELECT *, least(row_number() OVER (ORDER BY ");
        if self.by != ReportBy::Day {
            out.push_sql("input + output + cached_input + cache_write + reasoning DESC, ");
        }
        out.push_sql("name), 1 + ");
        out.push_bind_param::<BigInt, _>(&self.top)?;
        out.push_sql(") AS rank FROM used) SELECT rank, CASE WHEN rank > ");
        out.push_bind_param::<BigInt, _>(&self.top)?;
        out.push_sql(" THEN '' ELSE name END, count(*)");
        push_sums(&mut out);
        out.push_sql(" FROM ranked GROUP BY 1, 2 ORDER BY 1, 2");
        Ok(())
    }
}

impl QueryId for ReportQuery {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl Query for ReportQuery {
    type SqlType = (
        BigInt,
        Text,
        BigInt,
        (BigInt, BigInt, BigInt, BigInt, BigInt, BigInt),
    );
}
