use std::io::read_to_string;

use anyhow::Context as _;
use chrono::Utc;
use clap::Subcommand;

use super::{
    database::{Database, migrator},
    secrets,
    serve::PASSWORD_CHARS,
};
use crate::{
    auth::{Auth, InitialCredential, NewAccount, random_alphanumeric},
    config::{Loaded, Settings},
    model::{Origin, Person, Role, ScopeSet, TierName, Violation},
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
}

pub(super) async fn users(command: UsersCommand, loaded: Loaded) -> anyhow::Result<()> {
    let UsersCommand::Create {
        email,
        username,
        full_name,
        tier,
        admin,
        password_stdin,
    } = command;
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

pub(super) async fn services(command: ServicesCommand, loaded: Loaded) -> anyhow::Result<()> {
    let ServicesCommand::Create { name, scopes } = command;
    let name = named("--name", name.parse())?;
    let scopes = named("--scope", ScopeSet::parse(&scopes))?;
    with_auth(&loaded, async move |auth| {
        let (account, key) = auth
            .create_service_account(name, scopes, &Origin::operator())
            .await?;
        println!(
            "id      {}\nname    {}\nscopes  {}",
            account.id,
            account.name,
            account.scopes.names().join(" ")
        );
        println!("key     {key}");
        Ok(())
    })
    .await
}

/// Runs `work` on the database and keys of the settings.
async fn with_auth(
    loaded: &Loaded,
    work: impl AsyncFnOnce(Auth) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    loaded.check_secrets()?;
    let settings: &Settings = &loaded.settings;
    let database = Database::open(settings).await?;
    let outcome = async {
        migrator(&database.settings.url).await?.up()?;
        let (keys, master_key) = secrets::load(settings)?;
        let store = Store::new(&database.settings)?;
        tasks::make_partitions(&store, Utc::now()).await?;
        let auth = Auth::new(
            store.clone(),
            keys,
            &master_key,
            &settings.auth,
            &settings.password,
        )?;
        let outcome = work(auth).await;
        store.close();
        outcome
    }
    .await;
    database.close().await?;
    outcome
}

/// Says which flag a value was wrong for.
fn named<T>(flag: &str, value: Result<T, Violation>) -> anyhow::Result<T> {
    value.map_err(|violation| anyhow::anyhow!("{flag} {violation}"))
}
