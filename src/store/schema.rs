// @generated automatically by Diesel CLI.

diesel::table! {
    api_keys (id) {
        id -> Uuid,
        user_id -> Uuid,
        name -> Text,
        key_hash -> Bytea,
        scopes -> Array<Text>,
        created_at -> Timestamptz,
        expires_at -> Nullable<Timestamptz>,
        revoked_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    audit_events (occurred_at, id) {
        id -> Uuid,
        occurred_at -> Timestamptz,
        action -> Text,
        actor_kind -> Text,
        actor_id -> Nullable<Uuid>,
        target_id -> Uuid,
        request_id -> Text,
        address -> Nullable<Text>,
        user_agent -> Text,
        details -> Jsonb,
        user_id -> Nullable<Uuid>,
    }
}

diesel::table! {
    credit_draws (user_id, month, credit_id) {
        user_id -> Uuid,
        month -> Text,
        credit_id -> Uuid,
        tokens -> Int8,
    }
}

diesel::table! {
    credit_grants (id) {
        id -> Uuid,
        user_id -> Uuid,
        tokens -> Int8,
        priority -> Int4,
        granted_at -> Timestamptz,
        expires_at -> Nullable<Timestamptz>,
        voided_at -> Nullable<Timestamptz>,
        closed_at -> Nullable<Timestamptz>,
        drawn_tokens -> Int8,
        reason -> Text,
        request_id -> Uuid,
        actor_kind -> Text,
        actor_id -> Nullable<Uuid>,
        settled_before -> Nullable<Text>,
    }
}

diesel::table! {
    login_throttle (subject) {
        subject -> Text,
        failures -> Int4,
        last_failed_at -> Timestamptz,
        blocked_until -> Timestamptz,
    }
}

diesel::table! {
    monthly_model_usage (user_id, month, model) {
        user_id -> Uuid,
        month -> Text,
        model -> Text,
        input_tokens -> Int8,
        output_tokens -> Int8,
        cached_input_tokens -> Int8,
        cache_write_tokens -> Int8,
        reasoning_tokens -> Int8,
        request_count -> Int8,
        room -> Bytea,
    }
}

diesel::table! {
    one_time_tokens (id) {
        id -> Uuid,
        user_id -> Uuid,
        purpose -> Text,
        token_hash -> Bytea,
        email -> Text,
        created_at -> Timestamptz,
        expires_at -> Timestamptz,
    }
}

diesel::table! {
    outbox (id) {
        id -> Uuid,
        kind -> Text,
        payload -> Jsonb,
        created_at -> Timestamptz,
        available_at -> Timestamptz,
        attempts -> Int4,
        last_error -> Nullable<Text>,
        delivered_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    quota_balances (user_id, month, model) {
        user_id -> Uuid,
        month -> Text,
        model -> Text,
        base_limit -> Nullable<Int8>,
        leased -> Int8,
    }
}

diesel::table! {
    quota_leases (replica_id, user_id, month, model) {
        user_id -> Uuid,
        month -> Text,
        model -> Text,
        replica_id -> Uuid,
        granted -> Int8,
        operation -> Int8,
        operated_at -> Timestamptz,
    }
}

diesel::table! {
    quota_notices (month, user_id, threshold) {
        month -> Text,
        user_id -> Uuid,
        threshold -> Int4,
    }
}

diesel::table! {
    quota_overrides (user_id) {
        user_id -> Uuid,
        monthly_tokens -> Nullable<Int8>,
        expires_at -> Nullable<Timestamptz>,
        reason -> Text,
        actor_kind -> Text,
        actor_id -> Nullable<Uuid>,
        set_at -> Timestamptz,
    }
}

diesel::table! {
    quota_settlements (replica_id, hold_id) {
        replica_id -> Uuid,
        hold_id -> Int8,
        kind -> Text,
        tokens -> Int8,
    }
}

diesel::table! {
    recovery_codes (user_id, code_hash) {
        user_id -> Uuid,
        code_hash -> Bytea,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    replicas (id) {
        id -> Uuid,
        expires_at -> Timestamptz,
        holds_until -> Timestamptz,
        is_dead -> Bool,
    }
}

diesel::table! {
    service_accounts (id) {
        id -> Uuid,
        name -> Text,
        scopes -> Array<Text>,
        is_active -> Bool,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    service_keys (id) {
        id -> Uuid,
        service_account_id -> Uuid,
        key_hash -> Bytea,
        created_at -> Timestamptz,
        expires_at -> Nullable<Timestamptz>,
        revoked_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    sessions (id) {
        id -> Uuid,
        user_id -> Uuid,
        counter -> Int8,
        rotated_at -> Timestamptz,
        created_at -> Timestamptz,
        last_used_at -> Timestamptz,
        idle_expires_at -> Timestamptz,
        absolute_expires_at -> Timestamptz,
        revoked_at -> Nullable<Timestamptz>,
        user_agent -> Text,
        address -> Nullable<Text>,
        mfa -> Bool,
    }
}

diesel::table! {
    totp_credentials (user_id) {
        user_id -> Uuid,
        id -> Uuid,
        sealed_secret -> Bytea,
        created_at -> Timestamptz,
        confirmed_at -> Nullable<Timestamptz>,
        last_step -> Int8,
    }
}

diesel::table! {
    usage_records (event_id, user_id, usage_month) {
        usage_month -> Text,
        user_id -> Uuid,
        event_id -> Uuid,
        occurred_at -> Timestamptz,
        model -> Text,
        input_tokens -> Int8,
        output_tokens -> Int8,
        cached_input_tokens -> Int8,
        cache_write_tokens -> Int8,
        reasoning_tokens -> Int8,
        request_id -> Text,
        labels -> Jsonb,
        recorded_at -> Timestamptz,
    }
}

diesel::table! {
    user_erasures (user_id) {
        user_id -> Uuid,
        deleted_at -> Timestamptz,
        due_at -> Timestamptz,
        step -> Text,
        after_at -> Nullable<Timestamptz>,
        after_id -> Nullable<Uuid>,
    }
}

diesel::table! {
    users (id) {
        id -> Uuid,
        email -> Text,
        username -> Text,
        full_name -> Text,
        password_hash -> Nullable<Text>,
        role -> Text,
        tier -> Text,
        tier_updated_at -> Timestamptz,
        is_active -> Bool,
        auth_epoch -> Int8,
        email_verified_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        last_login_at -> Nullable<Timestamptz>,
        mfa_enabled -> Bool,
    }
}

diesel::joinable!(api_keys -> users (user_id));
diesel::joinable!(credit_draws -> users (user_id));
diesel::joinable!(credit_grants -> users (user_id));
diesel::joinable!(quota_overrides -> users (user_id));
diesel::joinable!(recovery_codes -> users (user_id));
diesel::joinable!(service_keys -> service_accounts (service_account_id));
diesel::joinable!(sessions -> users (user_id));
diesel::joinable!(totp_credentials -> users (user_id));

diesel::allow_tables_to_appear_in_same_query!(
    api_keys,
    audit_events,
    credit_draws,
    credit_grants,
    login_throttle,
    monthly_model_usage,
    one_time_tokens,
    outbox,
    quota_balances,
    quota_leases,
    quota_notices,
    quota_overrides,
    quota_settlements,
    recovery_codes,
    replicas,
    service_accounts,
    service_keys,
    sessions,
    totp_credentials,
    usage_records,
    user_erasures,
    users,
);
