//! Checks of quota as one would write them first: tonic on its default runtime, and one question to a
//! database for each check.
//!
//! What they leave out is in their favour: they ask nobody who calls, look for no user and no tier, and
//! know one limit for all. Statements are prepared once, the pool tests no connection; Redis is asked
//! through one connection that all calls share, and what is asked together goes in one write.

use std::{collections::VecDeque, sync::Arc};

use anyhow::Context as _;
use clap::ValueEnum;
use diesel::{
    OptionalExtension as _, QueryResult,
    pg::Pg,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{BigInt, Uuid as SqlUuid},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl, pooled_connection::deadpool::Pool};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    sync::{mpsc, oneshot},
};
use tollkeeper::proto::tollkeeper::usage::v1::{
    CheckQuotaRequest, CheckQuotaResponse, Quota, check_quota_response::Decision,
};
use tonic::{Request, Response, Status, codegen::BoxFuture, server::UnaryService};
use uuid::Uuid;

use super::CHECK_QUOTA;
use crate::naive;

/// Of everybody, a month: nobody reaches it here.
const LIMIT: i64 = 1 << 50;

/// Everybody has used something.
pub(super) const BALANCES: &str = "
    CREATE TABLE naive_balances (user_id uuid PRIMARY KEY, used bigint NOT NULL) WITH (fillfactor = 70);
    INSERT INTO naive_balances SELECT id, 1000 FROM users";

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// A SELECT: consumes nothing, so that two callers may both have the last tokens
    Select,
    /// An upsert that takes the tokens unless they exceed the limit
    Upsert,
    /// INCRBY, whose answer is held against the limit
    Redis,
}

impl Shape {
    pub(super) fn as_arg(self) -> &'static str {
        match self {
            Self::Select => "select",
            Self::Upsert => "upsert",
            Self::Redis => "redis",
        }
    }
}

/// Serves until standard input ends; `url` is the database's or the address of Redis.
pub(crate) fn serve(shape: Shape, url: &str) -> anyhow::Result<()> {
    naive::serve(CHECK_QUOTA, async || {
        let backend = match shape {
            Shape::Redis => Backend::Redis(Redis::connect(url).await?),
            Shape::Select | Shape::Upsert => Backend::Postgres(naive::pool(url)?, shape),
        };
        Ok(Naive(Arc::new(backend)))
    })
}

enum Backend {
    Postgres(Pool<AsyncPgConnection>, Shape),
    Redis(Redis),
}

impl Backend {
    /// What the user has used, with these tokens if they are taken; `None`: they exceed the limit.
    async fn used(&self, user: Uuid, tokens: i64) -> anyhow::Result<Option<i64>> {
        let (pool, shape) = match self {
            Self::Redis(redis) => {
                let used = redis.increment(user, tokens).await?;
                return Ok((used <= LIMIT).then_some(used));
            }
            Self::Postgres(pool, shape) => (pool, *shape),
        };
        let mut conn = pool.get().await?;
        let used: Option<i64> = match shape {
            Shape::Upsert => Take(user, tokens).get_result(&mut conn).await.optional()?,
            _ => Look(user).get_result(&mut conn).await.optional()?,
        };
        Ok(used.filter(|used| *used <= LIMIT))
    }
}

#[derive(Clone)]
struct Naive(Arc<Backend>);

impl UnaryService<CheckQuotaRequest> for Naive {
    type Response = CheckQuotaResponse;
    type Future = BoxFuture<Response<Self::Response>, Status>;

    fn call(&mut self, request: Request<CheckQuotaRequest>) -> Self::Future {
        let naive = self.clone();
        Box::pin(async move {
            let request = request.into_inner();
            let user = request.user_id.parse();
            let user = user.map_err(|_| Status::invalid_argument("not a user"))?;
            let used = naive.0.used(user, request.tokens).await.map_err(|error| {
                eprintln!("==> the naive server: {error:#}");
                Status::unavailable("")
            })?;
            let decision = match used {
                Some(_) => Decision::Allowed,
                None => Decision::MonthlyLimit,
            };
            let used_tokens = used.unwrap_or(LIMIT);
            Ok(Response::new(CheckQuotaResponse {
                decision: decision.into(),
                quota: Some(Quota {
                    limit_tokens: LIMIT,
                    used_tokens,
                    remaining_tokens: LIMIT - used_tokens,
                    ..Quota::default()
                }),
            }))
        })
    }
}

#[derive(QueryId)]
struct Look(Uuid);

impl Query for Look {
    type SqlType = BigInt;
}

impl QueryFragment<Pg> for Look {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT used FROM naive_balances WHERE user_id = ");
        out.push_bind_param::<SqlUuid, _>(&self.0)
    }
}

#[derive(QueryId)]
struct Take(Uuid, i64);

impl Query for Take {
    type SqlType = BigInt;
}

impl QueryFragment<Pg> for Take {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("INSERT INTO naive_balances AS b (user_id, used) VALUES (");
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(", ");
        out.push_bind_param::<BigInt, _>(&self.1)?;
        out.push_sql(
            ") ON CONFLICT (user_id) DO UPDATE SET used = b.used + EXCLUDED.used
             WHERE b.used + EXCLUDED.used <= ",
        );
        out.push_bind_param::<BigInt, _>(&LIMIT)?;
        out.push_sql(" RETURNING used");
        Ok(())
    }
}

/// A connection to Redis that all calls share. Speaks as much of RESP as INCRBY needs.
struct Redis(mpsc::UnboundedSender<(Vec<u8>, oneshot::Sender<i64>)>);

impl Redis {
    async fn connect(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (read, mut write) = stream.into_split();
        let (asked, mut asking) = mpsc::unbounded_channel::<(Vec<u8>, oneshot::Sender<i64>)>();
        let (sent, mut answering) = mpsc::unbounded_channel::<VecDeque<oneshot::Sender<i64>>>();
        tokio::spawn(async move {
            while let Some((mut bytes, waiting)) = asking.recv().await {
                let mut all = VecDeque::from([waiting]);
                // What came up meanwhile goes along.
                while let Ok((more, waiting)) = asking.try_recv() {
                    bytes.extend(more);
                    all.push_back(waiting);
                }
                if sent.send(all).is_err() || write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            let mut read = BufReader::with_capacity(64 * 1024, read);
            let mut line = Vec::new();
            while let Some(all) = answering.recv().await {
                for waiting in all {
                    line.clear();
                    // Whoever waits for what is missing is told when these tasks end.
                    if read.read_until(b'\n', &mut line).await.unwrap_or(0) == 0 {
                        return;
                    }
                    let number = std::str::from_utf8(&line).ok();
                    let number = number.and_then(|line| line.strip_prefix(':'));
                    let Some(Ok(number)) = number.map(|number| number.trim().parse()) else {
                        return;
                    };
                    let _ = waiting.send(number);
                }
            }
        });
        Ok(Self(asked))
    }

    async fn increment(&self, user: Uuid, tokens: i64) -> anyhow::Result<i64> {
        let (answer, answered) = oneshot::channel();
        let (key, by) = (format!("quota:{user}"), tokens.to_string());
        let bytes = format!(
            "*3\r\n$6\r\nINCRBY\r\n${}\r\n{key}\r\n${}\r\n{by}\r\n",
            key.len(),
            by.len()
        );
        let closed = "Redis has closed the connection";
        self.0
            .send((bytes.into_bytes(), answer))
            .ok()
            .context(closed)?;
        answered.await.context(closed)
    }
}
