use std::{fs, net::TcpListener};

use super::{
    home::{Home, MASTER_KEY, Outcome},
    jwks,
};
use tollkeeper::proto::tollkeeper::auth::v1::{
    LoginRequest, auth_service_client::AuthServiceClient,
};

use crate::{
    auth::mfa,
    harness::{eventually, login_through, validate_through},
};

/// The value behind a label such as `password  …`.
fn value(outcome: &Outcome, label: &str) -> String {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let mut lines = outcome.stdout.lines();
    let found = lines.find_map(|line| line.strip_prefix(label)?.strip_prefix(' '));
    found.expect(label).trim().to_owned()
}

#[track_caller]
fn refused(outcome: &Outcome, parts: &[&str]) {
    assert_ne!(outcome.code, Some(0), "{}", outcome.stdout);
    for part in parts {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
}

const USER: [&str; 4] = ["users", "create", "--email", "ada@example.com"];

#[test]
fn migrations_go_up_and_down_and_show_their_state() {
    let home = Home::with_database();
    let migrate = |what| {
        let outcome = home.run(&["migrate", what]);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        outcome.stdout
    };
    let pending = migrate("status");
    let count = pending.lines().count();
    assert!(count > 0);
    assert_eq!(pending.matches("pending  ").count(), count);
    assert_eq!(migrate("down"), "nothing to do: no migration is applied\n");

    assert_eq!(migrate("up"), pending.replace("pending  ", "applied "));
    assert_eq!(migrate("up"), "nothing to do: the schema is up to date\n");
    assert_eq!(migrate("status"), pending.replace("pending", "applied"));

    let newest = pending.lines().last().unwrap().replace("pending  ", "");
    assert_eq!(migrate("down"), format!("reverted {newest}\n"));
    assert_eq!(migrate("status").matches("pending").count(), 1);
    assert_eq!(migrate("up"), format!("applied {newest}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn created_users_and_services_work() {
    let home = Home::with_database();
    let run = |args: &[&str], input| home.finish(home.production(args), input);
    let ada = run(&[&USER[..], &["--username", "ada"]].concat(), "");
    let password = value(&ada, "password");
    assert_eq!(value(&ada, "username"), "ada");
    let bob = [
        "users",
        "create",
        "--email",
        "bob@example.com",
        "--username",
    ];
    let bob = run(
        &[&bob[..], &["bob", "--admin", "--password-stdin"]].concat(),
        "a password of my own\n",
    );
    assert_eq!(value(&bob, "username"), "bob");
    assert!(!bob.stdout.contains("password"), "{}", bob.stdout);
    let gateway = ["services", "create", "--name", "gateway", "--scope"];
    let gateway = run(
        &[&gateway[..], &["tokens.validate", "--scope", "quota"]].concat(),
        "",
    );
    let key = value(&gateway, "key");
    assert_eq!(value(&gateway, "scopes"), "tokens.validate quota");

    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    let tokens = login_through(&channel, "ada", &password).await.unwrap();
    login_through(&channel, "bob", "a password of my own")
        .await
        .unwrap();
    let validated = validate_through(&channel, &key, &tokens.access_token).await;
    assert_eq!(validated.unwrap().username, "ada");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_service_key_works_and_the_old_one_for_as_long_as_was_said() {
    let home = Home::with_database();
    let run = |args: &[&str]| home.finish(home.production(args), "");
    let create = [
        "services",
        "create",
        "--name",
        "gateway",
        "--scope",
        "tokens.validate",
    ];
    let first = value(&run(&create), "key");
    let user = run(&[&USER[..], &["--username", "ada"]].concat());
    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    let password = value(&user, "password");
    let tokens = login_through(&channel, "ada", &password).await.unwrap();
    let token = tokens.access_token;
    let works = async |key: &str| validate_through(&channel, key, &token).await.is_ok();

    let rotated = run(&["services", "rotate", "Gateway"]);
    let second = value(&rotated, "key");
    assert_eq!(value(&rotated, "name"), "gateway");
    let end = value(&rotated, "old keys end at").parse::<chrono::DateTime<chrono::Utc>>();
    let minutes = (end.unwrap() - chrono::Utc::now()).num_minutes();
    assert!((24 * 60 - 5..=24 * 60).contains(&minutes), "{minutes}");
    assert!(works(&first).await && works(&second).await);

    let third = value(
        &run(&["services", "rotate", "gateway", "--overlap", "0s"]),
        "key",
    );
    eventually("the service hears of it", async || !works(&first).await).await;
    assert!(!works(&second).await && works(&third).await);

    let rotate = |args: &[&str]| run(&[&["services", "rotate"], args].concat());
    refused(&rotate(&["nobody"]), &["no such service account"]);
    refused(&rotate(&["gateway", "--overlap", "31days"]), &["--overlap"]);
    refused(&rotate(&["gateway", "--overlap", "soon"]), &["--overlap"]);
    refused(&rotate(&["no body"]), &["NAME"]);
}

#[test]
fn users_and_services_that_cannot_be_are_refused_by_flag() {
    let home = Home::with_database();
    let run = |args: &[&str], input| home.finish(home.production(args), input);
    let user = |more: &[&str], input| run(&[&USER[..], more].concat(), input);
    assert_eq!(user(&["--username", "ada"], "").code, Some(0));
    refused(&user(&["--username", "ada2"], ""), &["exists"]);
    let again = ["users", "create", "--email", "x@example.com", "--username"];
    refused(&run(&[&again[..], &["ada"]].concat(), ""), &["exists"]);
    let bad = ["users", "create", "--email", "nobody", "--username", "bob"];
    refused(&run(&bad, ""), &["--email"]);
    refused(&user(&["--username", "b b"], ""), &["--username"]);
    refused(
        &user(&["--username", "eve", "--tier", "gold"], ""),
        &["--tier"],
    );
    let short = user(&["--username", "eve", "--password-stdin"], "short\n");
    refused(&short, &["password"]);

    let service = |args: &[&str]| run(&[&["services", "create"], args].concat(), "");
    let all_scopes = ["tokens.validate", "usage.write", "usage.read", "quota"];
    refused(
        &service(&["--name", "a-service", "--scope", "everything"]),
        &[&["--scope"], &all_scopes[..]].concat(),
    );
    refused(&service(&["--name", "a-service"]), &["--scope"]);
    refused(&service(&["--name", "", "--scope", "quota"]), &["--name"]);
    let twice = ["--name", "twice", "--scope", "quota"];
    assert_eq!(service(&twice).code, Some(0));
    refused(&service(&twice), &["exists"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_joins_the_private_database_of_a_running_service() {
    let home = Home::new();
    let mut service = home.serve();
    let channel = service.serving().await;
    let ada = home.run(&[&USER[..], &["--username", "ada"]].concat());
    let password = value(&ada, "password");
    login_through(&channel, "ada", &password).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn listed_keys_are_those_of_the_jwks() {
    let home = Home::with_database();
    let folder = home.path().join("keys");
    let folder = folder.to_str().unwrap();
    for algorithm in ["rs256", "es256", "eddsa"] {
        let args = [
            "keys",
            "generate",
            "--dir",
            folder,
            "--algorithm",
            algorithm,
        ];
        let made = home.run(&args);
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        assert!(fs::exists(made.stdout.trim()).unwrap());
    }
    let listed = home.run(&["keys", "list", "--dir", folder]).stdout;
    let listed: Vec<Vec<&str>> = listed
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let algorithms: Vec<&str> = listed.iter().map(|key| key[1]).collect();
    assert_eq!(algorithms, ["RS256", "ES256", "EdDSA"]);

    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    let mut published: Vec<(String, String)> = jwks(channel)
        .await
        .keys
        .into_iter()
        .map(|key| (key.kid, key.alg))
        .collect();
    published.sort();
    let mut kids: Vec<(String, String)> = listed
        .iter()
        .map(|key| (key[0].to_owned(), key[1].to_owned()))
        .collect();
    kids.sort();
    assert_eq!(published, kids);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_by_its_exit_code() {
    let home = Home::with_database();
    let mut service = home.start(home.production(&["serve"]));
    service.serving().await;
    let serving = format!("http://{}", service.address());
    let health = |address: &str, more: &[&str]| {
        home.run(&[&["health", "--address", address], more].concat())
    };
    let whole = health(&serving, &[]);
    assert_eq!((whole.code, whole.stdout.as_str()), (Some(0), "SERVING\n"));
    let one = ["--service", "tollkeeper.auth.v1.AuthService"];
    assert_eq!(health(&serving, &one).code, Some(0));
    refused(&health(&serving, &["--service", "another"]), &["another"]);

    // At an address of its own: elsewhere another test may be given the port.
    let closed = TcpListener::bind("127.0.0.2:0").unwrap().local_addr();
    let closed = format!("http://{}", closed.unwrap());
    refused(&health(&closed, &[]), &["nothing answers at", &closed]);
    refused(&health("nowhere in particular", &[]), &["no address"]);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    refused(&health(&silent, &["--timeout", "200ms"]), &["in time"]);
}

#[test]
fn the_descriptor_set_is_written_whole() {
    let written = Home::new().command(&["descriptor"]).output().unwrap();
    assert!(written.status.success());
    assert_eq!(written.stdout, tollkeeper::proto::DESCRIPTOR_SET);
}

#[test]
fn config_shows_where_each_value_is_from_and_hides_secrets() {
    let home = Home::with_database();
    let file = home.path().join("settings.toml");
    fs::write(&file, "[auth]\nissuer = \"from-file\"\naudience = \"x\"\n").unwrap();
    let args = ["config", "--set", "auth.access_ttl=5m", "--config"];
    let mut command = home.production(&[&args[..], &[file.to_str().unwrap()]].concat());
    command
        .env("TOLLKEEPER_AUTH_AUDIENCE", "from-environment")
        .env("DATABASE_URL", "postgresql://me:hunter22@db/x");
    let shown = home.finish(command, "");
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    for line in [
        "auth.access_ttl = \"5m\"  # command line",
        "auth.audience = \"from-environment\"  # TOLLKEEPER_AUTH_AUDIENCE",
        &format!("auth.issuer = \"from-file\"  # {}", file.display()),
        "auth.leeway = \"5s\"  # default",
        "auth.master_key = (hidden)  # TOLLKEEPER_AUTH_MASTER_KEY",
        "database.url = (hidden)  # DATABASE_URL",
        "dev = false  # default",
    ] {
        assert!(shown.stdout.lines().any(|l| l == line), "no {line}");
    }
    for secret in [MASTER_KEY, "hunter22"] {
        assert!(!shown.stdout.contains(secret));
    }
    let dev = Home::new().run(&["config"]).stdout;
    assert!(dev.contains("dev = true  # no database.url\n"), "{dev}");
}

#[test]
fn wrong_settings_are_named_with_a_hint() {
    let home = Home::new();
    let flag = home.run(&["config", "--set", "auth.acces_ttl=5m"]);
    let unknown = "tollkeeper: unknown setting auth.acces_ttl (from command line)";
    refused(&flag, &[unknown, "did you mean auth.access_ttl?"]);
    refused(&home.run(&["config", "--set", "auth"]), &["KEY=VALUE"]);
    refused(
        &home.run(&["serve", "--lsten", "x"]),
        &["--lsten", "'--listen'"],
    );

    let with = |name: &str, value: &str| {
        let mut command = home.command(&["config"]);
        command.env(name, value);
        home.finish(command, "")
    };
    let unknown = "unknown setting TOLLKEEPER_AUTH_ACCES_TTL";
    refused(
        &with("TOLLKEEPER_AUTH_ACCES_TTL", "5m"),
        &[unknown, "did you mean TOLLKEEPER_AUTH_ACCESS_TTL?"],
    );
    let wrong = with("TOLLKEEPER_AUTH_ACCESS_TTL", "soon");
    refused(
        &wrong,
        &["setting auth.access_ttl (from TOLLKEEPER_AUTH_ACCESS_TTL)"],
    );

    let file = home.path().join("settings.toml");
    let path = file.to_str().unwrap();
    let in_file = |text: &str| {
        fs::write(&file, text).unwrap();
        home.run(&["config", "--config", path])
    };
    let unknown = format!("unknown setting auth.acces_ttl (from {path})");
    refused(
        &in_file("[auth]\nacces_ttl = \"5m\"\n"),
        &[&unknown, "did you mean auth.access_ttl?"],
    );
    refused(&in_file("[auth\n"), &[path, "is not TOML", "line 1"]);
    let secret = in_file("[auth]\nmaster_key = 1234567890123456789\n");
    refused(&secret, &["setting auth.master_key", path]);
    assert!(!secret.stderr.contains("1234567890"), "{}", secret.stderr);
    let missing = home.run(&["config", "--config", "/nowhere.toml"]);
    refused(&missing, &["cannot read the settings file /nowhere.toml"]);
}

#[test]
fn help_says_what_each_command_does() {
    let home = Home::new();
    let commands: [(&[&str], &[&str]); 9] = [
        (
            &[],
            &[
                "serve       Run the service",
                "--database-url <URL>",
                "[env: DATABASE_URL]",
            ],
        ),
        (
            &["serve"],
            &[
                "runs its own Postgres in the data folder",
                "--listen <ADDRESS>",
            ],
        ),
        (
            &["migrate"],
            &["up      Apply", "down    Revert", "status  List"],
        ),
        (
            &["users", "create"],
            &[
                "--password-stdin",
                "--email <EMAIL>          E-mail address",
            ],
        ),
        (
            &["services", "create"],
            &["--scope <SCOPE>", "tokens.validate"],
        ),
        (&["keys", "generate"], &["[possible values: eddsa,"]),
        (&["keys", "list"], &["oldest first"]),
        (&["health"], &["exit code 0", "[default: server.listen"]),
        (&["config"], &["secrets stay hidden"]),
    ];
    for (command, parts) in commands {
        let help = home.run(&[command, &["--help"]].concat());
        assert_eq!(help.code, Some(0));
        for part in parts {
            assert!(help.stdout.contains(part), "{command:?}: {}", help.stdout);
        }
        // No option without a word on what it is for.
        for line in help
            .stdout
            .lines()
            .filter(|line| line.starts_with("      --"))
        {
            let described = line.trim().contains("  ") || command == ["serve"];
            assert!(described, "{command:?}: {line}");
        }
    }
    refused(&home.run(&[]), &["Usage: tollkeeper"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_takes_the_second_factor_of_who_lost_it_away() {
    let home = Home::with_database();
    let run = |args: &[&str]| home.finish(home.production(args), "");
    let ada = run(&[&USER[..], &["--username", "ada"]].concat());
    let password = value(&ada, "password");
    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    let token = login_through(&channel, "ada", &password).await.unwrap();
    mfa::enable_through(&channel, &token.access_token, &password).await;
    let mut auth = AuthServiceClient::new(channel.clone());
    let login = LoginRequest {
        identifier: "ada".to_owned(),
        password: password.clone(),
    };
    let answer = auth.login(login).await.unwrap().into_inner();
    assert!(answer.tokens.is_none() && answer.mfa_challenge.is_some());

    refused(&run(&["users", "reset-mfa", "bob"]), &["no such user"]);
    let reset = ["users", "reset-mfa", "ADA@example.com", "--reason", "lost"];
    let done = run(&reset);
    assert_eq!(value(&done, "second factor"), "taken away");
    assert_eq!(value(&done, "sessions ended"), "1");
    login_through(&channel, "ada", &password).await.unwrap();
    let again = run(&reset);
    assert_eq!(value(&again, "second factor"), "there was none");
    assert_eq!(value(&again, "sessions ended"), "0");
}
