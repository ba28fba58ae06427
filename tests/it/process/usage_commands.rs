use std::{
    collections::HashSet,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::Path,
    process::Stdio,
};

use chrono::Utc;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio_postgres::Client;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        ExportUsageRequest, export_usage_request::Format, export_usage_response::Content,
        usage_service_client::UsageServiceClient,
    },
};

use super::home::{Home, Outcome};
use crate::harness::{cluster, eventually, with_bearer};

/// Records of the export whose memory is watched. A million take minutes in a debug build; the bound
/// does not depend on how many there are.
fn many() -> i64 {
    let asked = std::env::var("TOLLKEEPER_TEST_EXPORT_RECORDS").ok();
    asked.map_or(200_000, |records| records.parse().expect("a number"))
}

/// Bytes that an export may add to an idle service.
const MEMORY: u64 = 50 * 1024 * 1024;

const ADA: &str = "01890a5d-ac96-774b-bcce-b302099a8057";
const GONE: &str = "01890a5d-ac96-774b-bcce-b302099a8058";

/// A migrated database in which Ada and somebody who is no more used tokens, this month and last.
struct Used {
    home: Home,
    client: Client,
    this: Period,
    /// Of a service that may read usage.
    key: String,
}

impl Used {
    async fn new() -> Self {
        let home = tokio::task::spawn_blocking(Home::with_database)
            .await
            .unwrap();
        // Migrates, and makes the partitions of these months.
        let create = [
            "services",
            "create",
            "--name",
            "reader",
            "--scope",
            "usage.read",
        ];
        let created = succeeded(home.finish(home.production(&create), ""));
        let mut lines = created.lines();
        let key = lines
            .find_map(|line| line.strip_prefix("key"))
            .expect("a key");
        let client = cluster::connect(home.database_url()).await;
        let this = Period::containing(Utc::now());
        let key = key.trim().to_owned();
        let used = Self {
            home,
            client,
            this,
            key,
        };
        used.sql(&format!(
            "INSERT INTO users (id, email, username, tier)
             VALUES ('{ADA}', 'ada@example.com', 'ada', 'free')"
        ))
        .await;
        for (user, month, records) in [(ADA, this, 30), (ADA, this.previous(), 4), (GONE, this, 10)]
        {
            used.fill(user, month, records).await;
        }
        used
    }

    /// Books records of a minute each from the beginning of a month on, a tenth of another model.
    async fn fill(&self, user: &str, month: Period, records: i64) {
        let start = month.start();
        self.sql(&format!(
            "INSERT INTO usage_records
             SELECT '{month}', '{user}', gen_random_uuid(), '{start}'::timestamptz
                     + n * interval '1 minute', CASE n % 10 WHEN 0 THEN 'rare' ELSE 'usual' END,
                 n, 1000, 0, 0, 5, 'r' || n, '{{\"team\": \"blue\"}}'
             FROM generate_series(1, {records}) n"
        ))
        .await;
        self.sql(
            "TRUNCATE monthly_model_usage;
             INSERT INTO monthly_model_usage
             SELECT user_id, usage_month, model, sum(input_tokens), sum(output_tokens),
                 sum(cached_input_tokens), sum(cache_write_tokens), sum(reasoning_tokens), count(*)
             FROM usage_records GROUP BY user_id, usage_month, model",
        )
        .await;
    }

    async fn sql(&self, statement: &str) {
        self.client.batch_execute(statement).await.expect(statement);
    }

    async fn ids(&self, condition: &str) -> HashSet<String> {
        let statement = format!("SELECT event_id::text FROM usage_records WHERE {condition}");
        let rows = self.client.query(&statement, &[]).await.expect(condition);
        rows.iter().map(|row| row.get(0)).collect()
    }

    fn usage(&self, args: &[&str]) -> Outcome {
        self.home.run(&[&["usage"], args].concat())
    }
}

#[track_caller]
fn succeeded(outcome: Outcome) -> String {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome.stdout
}

fn ids(ndjson: &str) -> HashSet<String> {
    let id = |line| {
        let line: Value = serde_json::from_str(line).expect(line);
        line["event_id"].as_str().expect("an id").to_owned()
    };
    ndjson.lines().map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_holds_what_was_asked_for() {
    let used = Used::new().await;
    let this = used.this.to_string();
    let (from, to) = (format!("{this}-01"), format!("{this}-01T00:05:00Z"));
    let by_id = format!("user_id = '{ADA}'");
    for (args, condition) in [
        (&["--all"][..], "true".to_owned()),
        (&["--user", "ADA"], by_id.clone()),
        (&["--user", "ada@example.com"], by_id.clone()),
        (&["--user", GONE], format!("user_id = '{GONE}'")),
        (
            &["--user", ADA, "--month", &this],
            format!("{by_id} AND usage_month = '{this}'"),
        ),
        (
            &["--all", "--from", &from, "--to", &to],
            format!("occurred_at >= '{from}Z' AND occurred_at < '{to}'"),
        ),
        (&["--all", "--model", "rare"], "model = 'rare'".to_owned()),
    ] {
        let args = [&["export", "--format", "ndjson"], args].concat();
        let file = succeeded(used.usage(&args));
        let wanted = used.ids(&condition).await;
        assert!(!wanted.is_empty(), "{args:?}");
        assert_eq!(ids(&file), wanted, "{args:?}");
        assert_eq!(file.lines().count(), wanted.len(), "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_appears_when_it_is_whole_and_nothing_is_drawn_without_a_terminal() {
    let used = Used::new().await;
    let path = used.home.path().join("usage.csv");
    let file = path.to_str().unwrap();
    let outcome = used.usage(&["export", "--all", "--output", file]);
    assert_eq!(outcome.stderr, "");
    let said = succeeded(outcome);
    let written = fs::read_to_string(&path).unwrap();
    assert!(said.starts_with("44 records, "), "{said}");
    assert!(said.trim_end().ends_with(file), "{said}");
    assert!(written.starts_with("user_id,occurred_at,event_id,model,"));
    assert_eq!(written.matches("\r\n").count(), 45);
    assert_eq!(written.matches(ADA).count(), 34);
    let same = succeeded(used.usage(&["export", "--all"]));
    assert_eq!(same, written);

    // What is named by a link is written to, and the link stays.
    let link = used.home.path().join("latest.csv");
    symlink(&path, &link).unwrap();
    fs::write(&path, "").unwrap();
    succeeded(used.usage(&["export", "--all", "--output", link.to_str().unwrap()]));
    assert!(link.is_symlink());
    assert_eq!(fs::read_to_string(&path).unwrap(), written);

    // One that fails on its way leaves the old file, and no piece of the new one.
    used.sql("UPDATE usage_records SET labels = '[]'").await;
    let failed = used.usage(&["export", "--all", "--output", file]);
    assert_eq!(failed.code, Some(1), "{}", failed.stdout);
    assert!(failed.stderr.starts_with("tollkeeper: internal error"));
    assert_eq!(fs::read_to_string(&path).unwrap(), written);
    assert_eq!(names_in(path.parent().unwrap(), ".usage.csv"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_replaced_for_those_who_may_read_it_and_no_other_file_is() {
    let used = Used::new().await;
    let folder = used.home.path().join("exports");
    fs::create_dir(&folder).unwrap();
    let (file, dangling) = (folder.join("usage.csv"), folder.join("dangling.csv"));
    let export = |path: &Path| used.usage(&["export", "--all", "--output", path.to_str().unwrap()]);
    succeeded(export(&file));
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    let new = folder.join("new");
    fs::write(&new, "").unwrap();
    assert_eq!(mode(&file), mode(&new), "as any new file");
    fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    // Only root may give a file away; whoever tests as somebody else tests the rest.
    let given = chown(&file, Some(1), Some(1));
    succeeded(export(&file));
    assert_eq!(mode(&file), 0o640);
    let owner = file.metadata().unwrap();
    assert_eq!(given.is_ok(), (owner.uid(), owner.gid()) == (1, 1));

    symlink("nowhere.csv", &dangling).unwrap();
    let refused = export(&dangling);
    assert_eq!(refused.code, Some(1), "{}", refused.stdout);
    assert!(
        refused.stderr.contains("cannot write"),
        "{}",
        refused.stderr
    );
    assert!(dangling.is_symlink());

    // Two at once write a whole file each, and the later one stays.
    let whole = fs::read(&file).unwrap();
    let args = [
        "usage",
        "export",
        "--all",
        "--output",
        file.to_str().unwrap(),
    ];
    let mut both = [0, 1].map(|_| used.home.start(used.home.command(&args)));
    for export in &mut both {
        assert_eq!(export.ended().code(), Some(0), "{}", export.log());
    }
    assert_eq!(fs::read(&file).unwrap(), whole);

    for stdout in ["-", "/dev/stdout", "/dev/fd/1"] {
        let written = succeeded(used.usage(&["export", "--all", "--output", stdout]));
        assert_eq!(written.as_bytes(), whole, "{stdout}");
    }
    assert_eq!(names_in(&folder, "").len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_interrupted_leaves_the_file_as_it_was() {
    let used = Used::new().await;
    let folder = used.home.path().join("exports");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("usage.csv");
    fs::write(&file, "as it was").unwrap();
    used.sql("BEGIN; LOCK TABLE usage_records").await;
    let args = [
        "usage",
        "export",
        "--all",
        "--output",
        file.to_str().unwrap(),
    ];
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut export = used.home.start(used.home.command(&args));
        eventually("the export has begun", async || {
            names_in(&folder, "").len() == 2
        })
        .await;
        export.signal(signal);
        assert_eq!(export.ended().code(), Some(1));
        let said = export.log();
        assert!(said.starts_with("tollkeeper: interrupted: "), "{said}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "as it was");
        assert_eq!(names_in(&folder, "").len(), 1);
    }
}

/// The files of a folder whose names begin so.
fn names_in(folder: &Path, prefix: &str) -> Vec<String> {
    let names = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().file_name());
    let names = names.map(|name| name.into_string().expect("UTF-8"));
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_only_read_gets_reports_and_files_while_others_migrate() {
    let used = Used::new().await;
    // As the lock of migrations is held by one that waits.
    used.sql("SELECT pg_advisory_lock(x'746f6c6c0001'::bigint)")
        .await;
    let read_only = "?options=-c%20default_transaction_read_only%3Don";
    let reader = Home::with_database_at(&[used.home.database_url(), read_only].concat());
    let report = succeeded(reader.run(&["usage", "report"]));
    assert!(report.contains("usual"), "{report}");
    let file = succeeded(reader.run(&["usage", "export", "--all"]));
    assert_eq!(file.lines().count(), 45);
    let status = succeeded(reader.run(&["migrate", "status"]));
    assert!(!status.contains("pending"), "{status}");

    let empty = cluster::empty_database().await;
    let nothing = Home::with_database_at(&empty);
    let refused = nothing.run(&["usage", "report"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stdout);
    let tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace";
    let made = cluster::connect(&empty).await.query_one(tables, &[]).await;
    assert_eq!(made.unwrap().get::<_, i64>(0), 0, "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_reads_only_the_beginning_ends_it_without_a_word() {
    let used = Used::new().await;
    let path = used.home.path().join("usage.csv");
    let file = path.to_str().unwrap();
    for args in [
        &["usage", "report"][..],
        &["usage", "report", "--month", "2001-01"],
        &["usage", "export", "--all"],
        &["usage", "export", "--all", "--output", file],
        &["migrate", "status"],
        &["migrate", "up"],
    ] {
        let mut command = used.home.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!((ended.status.code(), &*said), (Some(0), ""), "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_reads_changes_no_schema_and_makes_no_database() {
    let used = Used::new().await;
    succeeded(used.home.run(&["migrate", "down"]));
    let without = Home::new();
    for command in [&["usage", "report"][..], &["usage", "export", "--all"]] {
        let refused = used.home.run(command);
        assert_eq!(refused.code, Some(1), "{}", refused.stdout);
        let why = "the schema is not up to date: run `tollkeeper migrate up` first";
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
        let refused = without.run(command);
        assert_eq!(refused.code, Some(1), "{}", refused.stdout);
        let why = "there is no database in";
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
    }
    let pending = succeeded(used.home.run(&["migrate", "status"]));
    assert!(pending.contains("pending"), "{pending}");
    assert!(!without.data_dir().join("postgres").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_command_is_said() {
    let used = Used::new().await;
    for (args, code, says) in [
        (&["export"][..], 2, "<--user <USER>|--all>"),
        (
            &["export", "--all", "--user", "ada"],
            2,
            "cannot be used with",
        ),
        (&["export", "--all", "--format", "xml"], 2, "csv, ndjson"),
        (
            &["export", "--all", "--month", "2026-13"],
            1,
            "--month must be a month",
        ),
        (
            &["export", "--all", "--from", "noon"],
            1,
            "--from must be a time such as",
        ),
        (
            &["export", "--all", "--to", "2026-02-30"],
            1,
            "--to must be a time such as",
        ),
        (
            &[
                "export",
                "--all",
                "--from",
                "2026-02-02",
                "--to",
                "2026-02-02",
            ],
            1,
            "--from must be before --to",
        ),
        (
            &["export", "--all", "--model", "a model"],
            1,
            "--model must be",
        ),
        (&["export", "--user", "nobody"], 1, "no such user"),
        (&["export", "--user", "no body"], 1, "--user must be"),
        (
            &["export", "--all", "--output", "no/such/file"],
            1,
            "cannot write no/such/file",
        ),
        (&["report", "--month", "May"], 1, "--month must be a month"),
        (&["report", "--top", "0"], 2, "0 is not in 1..=1000"),
        (&["report", "--by", "hour"], 2, "model, user, day"),
    ] {
        let outcome = used.usage(args);
        assert_eq!(outcome.code, Some(code), "{args:?}: {}", outcome.stdout);
        assert!(
            outcome.stderr.contains(says),
            "{args:?}: {}",
            outcome.stderr
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_shows_a_month_by_model_user_or_day() {
    let used = Used::new().await;
    let this = used.this.to_string();
    /// The numbers of the line that begins with `name`.
    fn numbers(report: &str, name: &str) -> Vec<String> {
        let line = report.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("{name} in {report}"));
        let words = line
            .split_whitespace()
            .skip(name.split_whitespace().count());
        words.map(str::to_owned).collect()
    }
    // n from 1 to 30 and from 1 to 10: 465 + 55 input; of `rare` 10 + 20 + 30 and 10.
    let by_model = succeeded(used.usage(&["report"]));
    assert!(
        by_model.starts_with(&format!("{this} by model, tokens\n")),
        "{by_model}"
    );
    let all = ["40", "520", "40,000", "0", "0", "200", "40,720"];
    assert_eq!(numbers(&by_model, "all"), all);
    let usual = ["36", "450", "36,000", "0", "0", "180", "36,630"];
    assert_eq!(numbers(&by_model, "usual"), usual);
    assert_eq!(numbers(&by_model, "rare")[0], "4");
    let (table, chart) = by_model.split_once("all").unwrap();
    assert!(table.find("usual") < table.find("rare"), "largest first");
    assert!(chart.contains("█ ") && chart.contains("90.0 %"), "{chart}");

    let by_user = succeeded(used.usage(&["report", "--by", "user", "--month", &this]));
    assert_eq!(numbers(&by_user, "ada")[0], "30");
    assert_eq!(numbers(&by_user, GONE)[0], "10");
    let largest = succeeded(used.usage(&["report", "--by", "user", "--top", "1"]));
    assert_eq!(numbers(&largest, "1 other")[0], "10");
    assert_eq!(numbers(&largest, "all"), all);

    let by_day = succeeded(used.usage(&["report", "--by", "day", "--user", "ada"]));
    let first = numbers(&by_day, &format!("{this}-01"));
    assert_eq!(first, ["30", "465", "30,000", "0", "0", "150", "30,615"]);

    let before = used.this.previous().to_string();
    let days = succeeded(used.usage(&["report", "--by", "day", "--month", &before]));
    assert_eq!(numbers(&days, &format!("{before}-01"))[0], "4");
    assert_eq!(numbers(&days, &format!("{before}-28"))[0], "0");
    let before = succeeded(used.usage(&["report", "--month", &before]));
    assert_eq!(numbers(&before, "all")[0], "4");
    let never = succeeded(used.usage(&["report", "--month", "2001-01"]));
    assert_eq!(never, "no usage in 2001-01\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_takes_little_memory_however_long_it_is() {
    let (used, many) = (Used::new().await, many());
    let start = used.this.start();
    used.sql(&format!(
        "INSERT INTO usage_records
         SELECT '{}', '{ADA}', gen_random_uuid(), '{start}'::timestamptz + n * interval '1 ms',
             'a-model', n, 1, 0, 0, 0, 'request-' || n, '{{\"team\": \"blue\", \"feature\": \"x\"}}'
         FROM generate_series(1, {many}) n",
        used.this
    ))
    .await;
    let mut service = used.home.start(used.home.production(&["serve"]));
    let mut usage = UsageServiceClient::new(service.serving().await);
    let pid = service.child.id();

    // A first one, so that what any call brings with it counts as idle.
    let (mut peak, mut idle) = (0, 0);
    for (model, records, wanted) in [("rare", 4, 70), ("a-model", many, many * (many + 1) / 2)] {
        idle = resident(pid);
        let request = ExportUsageRequest {
            all_users: true,
            model: model.to_owned(),
            format: Format::Csv.into(),
            ..ExportUsageRequest::default()
        };
        let request = with_bearer(request, &used.key);
        let mut stream = usage.export_usage(request).await.unwrap().into_inner();
        let (mut summary, mut lines, mut input) = (None, 0, 0);
        while let Some(message) = stream.message().await.unwrap() {
            peak = peak.max(resident(pid));
            match message.content.unwrap() {
                Content::Summary(told) => summary = Some(told),
                Content::Data(data) => {
                    for line in std::str::from_utf8(&data).unwrap().split_terminator("\r\n") {
                        let column = line.split(',').nth(4).unwrap();
                        input += column.parse::<i64>().unwrap_or_default();
                        lines += 1;
                    }
                }
            }
        }
        assert_eq!(summary.unwrap().record_count, lines - 1);
        assert_eq!((lines - 1, input), (records, wanted));
    }
    println!("{many} records: idle {idle}, at most {peak} bytes");
    assert!(peak < idle + MEMORY, "idle {idle}, at most {peak}");
}

/// Bytes of memory that a process has now.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("VmRSS") * 1024
}
