use std::{io::read_to_string, time::Duration};

use anyhow::Context as _;
use chrono::{SecondsFormat, Utc};
use clap::Subcommand;

use super::{
    database::{Database, Preparation},
    import, named, secrets,
    serve::PASSWORD_CHARS,
};
use crate::{
    auth::{Auth, InitialCredential, NewAccount, random_alphanumeric},
    config::{Loaded, Settings},
    model::{
        Identifier, KeyOverlap, Origin, Person, Role, ScopeSet, ServiceAccount, ServiceName,
        TierName,
    },
    store::Store,
    tasks,
    usage::load_tiers,
};

#[derive(Subcommand)]
pub(super) enum UsersCommand {
    /// Create a user; prints a random password unless one is given
    Create {
        /// E-mail address, to log in with
        #[arg(long)]
        email: String,
        /// Username, to log in with as well
        #[arg(long)]
        username: String,
        /// Name for people to read
        #[arg(long, default_value = "", hide_default_value = true)]
        full_name: String,
        /// Tier; else the default one
        #[arg(long)]
        tier: Option<String>,
        /// Make an administrator
        #[arg(long)]
        admin: bool,
        /// Read the password from standard input
        #[arg(long)]
        password_stdin: bool,
    },
    /// Import users of another system, with the hashes of their passwords
    ///
    /// Each row is imported, was imported before, or is broken: the last are told, and leave the
    /// others alone. Run it again after it was cut short, or with a mended file: nobody is imported
    /// twice. Exit code 1 when rows were broken.
    Import(import::ImportArgs),
    /// Take away the second factor of a user who lost it, and end the sessions of a user who had one
    ResetMfa {
        /// E-mail address or username
        user: String,
        /// Why, for the audit trail
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
}

#[derive(Subcommand)]
pub(super) enum ServicesCommand {
    /// Create a service account; prints its key, this once
    Create {
        /// Name, for people to read
        #[arg(long)]
        name: String,
        /// What it may do; repeat for more: tokens.validate, usage.write, usage.read, quota,
        /// gateway, admin
        #[arg(long = "scope", required = true, value_name = "SCOPE")]
        scopes: Vec<String>,
    },
    /// Give a service account a new key, printed this once; the old ones work for a while longer
    Rotate {
        /// Name of the service account
        name: String,
        /// How long the old keys go on working, at most 30days; 0s: not at all [default: 24h]
        #[arg(long, value_parser = humantime::parse_duration)]
        overlap: Option<Duration>,
    },
}

pub(super) async fn users(command: UsersCommand, loaded: Loaded) -> anyhow::Result<()> {
    let (email, username, full_name, tier, admin, password_stdin) = match command {
        UsersCommand::Import(args) => return import::run(args, loaded).await,
        UsersCommand::Create {
            email,
            username,
            full_name,
            tier,
            admin,
            password_stdin,
        } => (email, username, full_name, tier, admin, password_stdin),
        UsersCommand::ResetMfa { user, reason } => {
            return reset_mfa(&user, &reason, &loaded).await;
        }
    };
    let tiers = load_tiers(&loaded.settings.usage.tiers_file)?;
    let tier = match tier {
        Some(name) => named("--tier", name.parse()).and_then(|name: TierName| {
            tiers
                .get(&name)
                .context("--tier names no configured tier")
                .map(|tier| tier.name.clone())
        })?,
        None => tiers.default_tier().name.clone(),
    };
    let (password, given) = if password_stdin {
        let text = read_to_string(std::io::stdin()).context("cannot read the password")?;
        (text.trim_end_matches(['\r', '\n']).to_owned(), true)
    } else {
        (random_alphanumeric(PASSWORD_CHARS)?, false)
    };
    let new = NewAccount {
        person: Person {
            email: named("--email", email.parse())?,
            username: named("--username", username.parse())?,
            full_name: named("--full-name", full_name.parse())?,
        },
        credential: InitialCredential::Password(password.clone()),
        role: if admin { Role::Admin } else { Role::User },
        tier,
    };
    with_auth(&loaded, async move |auth| {
        let user = auth.create_account(new, &Origin::operator()).await?;
        println!(
            "id        {}\nusername  {}\ntier      {}",
            user.id, user.username, user.tier
        );
        if !given {
            println!("password  {password}");
        }
        Ok(())
    })
    .await
}

async fn reset_mfa(user: &str, reason: &str, loaded: &Loaded) -> anyhow::Result<()> {
    let identifier: Identifier = named("USER", user.parse())?;
    anyhow::ensure!(
        reason.chars().count() <= 500 && !reason.contains('\0'),
        "--reason must be at most 500 characters"
    );
    with_auth(loaded, async move |auth| {
        let user = auth.user_by_identifier(&identifier).await?;
        let (user, reset) = auth
            .reset_mfa(user.id, reason, &Origin::operator(), Utc::now())
            .await?;
        println!(
            "id              {}\nusername        {}",
            user.id, user.username
        );
        if reset.was_enabled {
            println!("second factor   taken away");
        } else {
            println!("second factor   there was none");
        }
        println!("sessions ended  {}", reset.sessions_ended);
        Ok(())
    })
    .await
}

pub(super) async fn services(command: ServicesCommand, loaded: Loaded) -> anyhow::Result<()> {
    match command {
        ServicesCommand::Create { name, scopes } => create_service(&name, &scopes, &loaded).await,
        ServicesCommand::Rotate { name, overlap } => rotate_key(&name, overlap, &loaded).await,
    }
}

async fn create_service(name: &str, scopes: &[String], loaded: &Loaded) -> anyhow::Result<()> {
    let name = named("--name", name.parse())?;
    let scopes = named("--scope", ScopeSet::parse(scopes))?;
    with_auth(loaded, async move |auth| {
        let (account, key) = auth
            .create_service_account(name, scopes, &Origin::operator())
            .await?;
        print_key(&account, &key);
        Ok(())
    })
    .await
}

async fn rotate_key(name: &str, overlap: Option<Duration>, loaded: &Loaded) -> anyhow::Result<()> {
    let name: ServiceName = named("NAME", name.parse())?;
    let overlap = overlap.map_or(Ok(KeyOverlap::DEFAULT), Duration::try_into);
    let overlap = named("--overlap", overlap)?;
    with_auth(loaded, async move |auth| {
        let account = auth.service_account_by_name(&name).await?;
        let rotated = auth
            .rotate_service_key(account.id, overlap, &Origin::operator(), Utc::now())
            .await?;
        print_key(&rotated.account, &rotated.key);
        let end = rotated
            .old_keys_end_at
            .to_rfc3339_opts(SecondsFormat::Secs, true);
        println!("old keys end at {end}");
        Ok(())
    })
    .await
}

fn print_key(account: &ServiceAccount, key: &str) {
    println!(
        "id      {}\nname    {}\nscopes  {}\nkey     {key}",
        account.id,
        account.name,
        account.scopes.names().join(" ")
    );
}

/// Runs `work` on the database and keys of the settings.
pub(super) async fn with_auth(
    loaded: &Loaded,
    work: impl AsyncFnOnce(Auth) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    with_auth_on(loaded, Preparation::Up, work).await
}

pub(super) async fn with_auth_on(
    loaded: &Loaded,
    preparation: Preparation,
    work: impl AsyncFnOnce(Auth) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    loaded.check_secrets()?;
    let settings: &Settings = &loaded.settings;
    preparation.check(settings)?;
    let database = Database::open(settings).await?;
    let outcome = async {
        preparation.prepare(&database).await?;
        let (keys, master_key) = secrets::load(settings)?;
        let store = Store::new(&database.settings)?;
        if preparation == Preparation::Up {
            tasks::make_partitions(&store, Utc::now()).await?;
        }
        let auth = Auth::new(
            store.clone(),
            keys,
            &master_key,
            &settings.auth,
            &settings.password,
            &settings.throttle,
        )?;
        let outcome = work(auth).await;
        store.close();
        outcome
    }
    .await;
    database.close().await?;
    outcome
}
