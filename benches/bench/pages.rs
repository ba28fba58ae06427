//! Part `pages`: what a page far down a long list of users costs beside the first one.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;
use tollkeeper::proto::tollkeeper::admin::v1::{
    ListUsersRequest, admin_service_client::AdminServiceClient,
};
use tonic::transport::Channel;

use crate::{
    Options,
    fixture::{Fixture, with_bearer},
    load::Slice,
    process::Server,
    report::{self, Row},
    runtime,
};

/// Which page is held against the first, if there are as many.
const FAR: usize = 1_000;

pub(crate) struct Plan {
    pub(crate) users: usize,
    pub(crate) options: Options,
}

/// A list, by the request for its first page.
struct List {
    title: &'static str,
    request: ListUsersRequest,
}

fn lists() -> [List; 3] {
    let page = |page_size| ListUsersRequest {
        page_size,
        ..ListUsersRequest::default()
    };
    [
        List {
            title: "50 a page",
            request: page(50),
        },
        List {
            title: "1,000 a page",
            request: page(1_000),
        },
        List {
            title: "50 a page, active ones of a tier",
            request: ListUsersRequest {
                tier: "advanced".to_owned(),
                is_active: Some(true),
                ..page(50)
            },
        },
    ]
}

pub(crate) fn run(plan: &Plan) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let fixture = Fixture::start(&plan.options.service, plan.users, None);
    let fixture = runtime.block_on(fixture)?;
    let measured = fixture
        .serve("service", &[])
        .and_then(|server| measure(plan, &runtime, &fixture, &server));
    runtime.block_on(fixture.close())?;
    let measured = measured?;

    println!(
        "\n  {:<52} {:>10} {:>14} {:>9} {:>9}",
        "", "per second", "all CPU µs", "p50 µs", "p99 µs"
    );
    let mut results = Vec::new();
    for [first, far] in &measured {
        for row in [first, far] {
            println!(
                "  {:<52} {:>10.1} {:>14.1} {:>9.0} {:>9.0}",
                row.title,
                row.spread(Slice::per_second).median,
                row.spread(Slice::cpu_us_per_call).median,
                row.spread(|s| s.p50_us).median,
                row.spread(|s| s.p99_us).median,
            );
        }
        let time = far.ratio(first, |s| s.p50_us);
        let cpu = far.ratio(first, Slice::cpu_us_per_call);
        println!(
            "  {:<52} takes {:.2} ({:.2}–{:.2}) of the first one's time, {:.2} of its CPU",
            "", time.median, time.min, time.max, cpu.median
        );
        results.push(json!({
            "first": first.title, "far": far.title,
            "first_p50_us": first.spread(|s| s.p50_us).json(),
            "far_p50_us": far.spread(|s| s.p50_us).json(),
            "far_of_first_time": time.json(), "far_of_first_cpu": cpu.json(),
        }));
    }
    let result = json!({
        "users": plan.users, "rounds": plan.options.rounds(),
        "slice_seconds": plan.options.slice().as_secs_f64(), "lists": results,
    });
    report::write_json(&plan.options.results, "pages", &result)?;
    println!("written to {}/pages.json", plan.options.results.display());
    Ok(())
}

fn measure(
    plan: &Plan,
    runtime: &tokio::runtime::Runtime,
    fixture: &Fixture,
    server: &Server,
) -> anyhow::Result<Vec<[Row; 2]>> {
    let key = fixture.service_key.as_str();
    let url = format!("http://{}", server.address);
    let channel = runtime.block_on(Channel::from_shared(url)?.connect())?;
    let mut admin = AdminServiceClient::new(channel);
    let postgres = fixture.postgres()?;
    // One after the other, by an ordinary client: a page is more than the load generator takes in.
    let mut slice = |request: &ListUsersRequest| -> anyhow::Result<Slice> {
        let before = (server.cpu()?, postgres.cpu()?);
        let begun = Instant::now();
        let mut latencies = Vec::new();
        while begun.elapsed() < plan.options.slice() {
            let asked = Instant::now();
            let request = with_bearer(request.clone(), key)?;
            runtime.block_on(admin.list_users(request))?;
            latencies.push(asked.elapsed());
        }
        let took = begun.elapsed();
        let micros = |after: Duration, before| after.saturating_sub(before).as_secs_f64() * 1e6;
        Ok(Slice {
            server_cpu_us: micros(server.cpu()?, before.0),
            postgres_cpu_us: micros(postgres.cpu()?, before.1),
            ..Slice::of(latencies, took)
        })
    };
    let mut measured = Vec::new();
    for List { title, request } in lists() {
        let (number, far) = runtime.block_on(walk(server, key, plan.users, &request))?;
        let pages = [request, far];
        let mut rows = [
            Row::new("first", format!("page 1, {title}")),
            Row::new("far", format!("page {number}, {title}")),
        ];
        for request in &pages {
            slice(request)?;
        }
        for round in 0..plan.options.rounds() {
            for turn in 0..2 {
                let index = (turn + round) % 2;
                rows[index].rounds.push(slice(&pages[index])?);
            }
        }
        measured.push(rows);
    }
    Ok(measured)
}

/// The request for the page far down, and its number; as clients come there, page by page.
async fn walk(
    server: &Server,
    key: &str,
    users: usize,
    first: &ListUsersRequest,
) -> anyhow::Result<(usize, ListUsersRequest)> {
    let url = format!("http://{}", server.address);
    let channel = Channel::from_shared(url)?.connect().await?;
    let mut admin = AdminServiceClient::new(channel);
    let size = usize::try_from(first.page_size)?;
    let number = FAR.min(users / size);
    ensure!(number > 1, "{users} users are one page");
    let mut request = first.clone();
    for page in 1..number {
        let answer = admin.list_users(with_bearer(request.clone(), key)?).await?;
        let answer = answer.into_inner();
        ensure!(answer.users.len() == size, "page {page} is not full");
        request.page_token = answer.next_page_token;
    }
    let answer = admin.list_users(with_bearer(request.clone(), key)?).await?;
    let found = answer.into_inner().users.len();
    ensure!(found == size, "page {number} holds {found} users");
    Ok((number, request))
}
