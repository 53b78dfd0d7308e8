//! Times beside what was to do: rates, and the share of what the device could do at best.

use dsc_ir::artifact::Header;
use dsc_ir::work::Cost;
use dsc_ir::{Sym, SymValues};
use dsc_runtime::{Limits, ProfileRow};
use std::collections::BTreeMap;

/// Median, least and largest of some microseconds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Summary {
    pub median_us: f64,
    pub min_us: f64,
    pub max_us: f64,
}

impl Summary {
    pub fn of(mut us: Vec<f64>) -> Summary {
        us.sort_by(f64::total_cmp);
        let at = |i: usize| us.get(i).copied().unwrap_or(0.0);
        Summary { median_us: at(us.len() / 2), min_us: at(0), max_us: at(us.len().saturating_sub(1)) }
    }
}

/// What ran: steps of a header by number, and their symbols; one list a request.
pub type Requests = Vec<Vec<(usize, SymValues)>>;

/// Work, and the least time it can take launch by launch.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub cost: Cost,
    pub floor_s: f64,
}

impl Tally {
    /// Adds one launch.
    pub fn add(&mut self, cost: &Cost, limits: Option<&Limits>) {
        self.cost += cost;
        self.floor_s += limits.map_or(0.0, |l| l.seconds(cost));
    }

    /// The mean of `n`.
    pub fn divided(mut self, n: usize) -> Tally {
        let n = n.max(1) as f64;
        self.cost.flop.values_mut().for_each(|flop| *flop /= n);
        self.cost.bytes /= n;
        self.floor_s /= n;
        self
    }
}

/// Rates over some time.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Achieved {
    /// FLOP of matrix products.
    pub flop: f64,
    /// Bytes that must be moved.
    pub bytes: f64,
    pub tflop_per_s: f64,
    pub gb_per_s: f64,
    /// The least time: launch by launch the slower of moving and multiplying at the device's limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor_us: Option<f64>,
    /// The least time over the measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_limit: Option<f64>,
}

impl Achieved {
    /// What `us` microseconds make of `tally`.
    pub fn new(tally: &Tally, us: f64) -> Achieved {
        let (flop, bytes) = (tally.cost.all_flop(), tally.cost.bytes);
        let floor_us = (tally.floor_s > 0.0).then_some(tally.floor_s * 1e6);
        Achieved {
            flop,
            bytes,
            tflop_per_s: flop / us.max(1e-3) / 1e6,
            gb_per_s: bytes / us.max(1e-3) / 1e3,
            floor_us,
            share_of_limit: floor_us.map(|floor| floor / us.max(1e-3)),
        }
    }

    /// Cells of a table under [`HEADER`].
    pub fn cells(&self) -> Vec<String> {
        let share = self.share_of_limit.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s));
        let scaled = |x: f64, unit: f64| short(x / unit);
        vec![scaled(self.flop, 1e6), scaled(self.bytes, 1e6), short(self.tflop_per_s), short(self.gb_per_s), share]
    }
}

/// Columns of [`Achieved::cells`].
pub const HEADER: [&str; 5] = ["MFLOP", "MB", "TFLOP/s", "GB/s", "of limit"];

/// Three digits.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".into(),
        a if a < 0.01 => format!("{x:.4}"),
        a if a < 1.0 => format!("{x:.3}"),
        a if a < 10.0 => format!("{x:.2}"),
        a if a < 100.0 => format!("{x:.1}"),
        _ => format!("{x:.0}"),
    }
}

/// The rates that a device is compared with, in a line.
pub fn limits_line(limits: &Limits) -> String {
    let rates = limits.flop_per_s.iter().map(|(dtype, rate)| format!("{} TFLOP/s {dtype}", short(rate / 1e12)));
    let rates: Vec<String> = rates.collect();
    format!("limit: {} GB/s, {} ({})", short(limits.bytes_per_s / 1e9), rates.join(", "), limits.source)
}

/// Bytes that requests come back to: weights and intermediate results, or what one moves if that is less.
pub fn working_set(header: &Header, requests: &Requests) -> u64 {
    let rows = requests.iter().flatten().map(|(_, syms)| syms.get(Sym::C)).max().unwrap_or(0);
    let weights: u64 = header.weights.iter().filter_map(|w| w.bytes(rows)).sum();
    let arena = requests.iter().flatten().map(|(step, _)| header.steps[*step].arena_bytes).max().unwrap_or(0);
    let moved = tally(header, requests, None).cost.bytes / requests.len().max(1) as f64;
    (moved as u64).min(weights.saturating_add(arena))
}

/// All requests together.
pub fn tally(header: &Header, requests: &Requests, limits: Option<&Limits>) -> Tally {
    let mut all = Tally::default();
    for_each_launch(header, requests, &mut |_, _, cost| all.add(cost, limits));
    all
}

fn for_each_launch(header: &Header, requests: &Requests, f: &mut dyn FnMut(usize, usize, &Cost)) {
    for (step, syms) in requests.iter().flatten() {
        // Launches of one kernel in one step have the same work.
        let mut costs: BTreeMap<u32, Cost> = BTreeMap::new();
        for launch in &header.steps[*step].launches {
            let kernel = launch.kernel;
            let entry = &header.kernels[kernel as usize];
            let cost = costs.entry(kernel).or_insert_with(|| {
                // Such as the LM head of a chunk that is not a prompt's last.
                let idle = entry.grid.iter().any(|dim| dim.eval(syms) == 0);
                if idle { Cost::default() } else { entry.work.eval(syms) }
            });
            f(*step, kernel as usize, cost);
        }
    }
}

/// One kernel's share of a profile.
#[derive(Debug, serde::Serialize)]
pub struct KernelShare {
    pub launches: u64,
    pub total_us: f64,
    /// Over all launches.
    #[serde(flatten)]
    pub achieved: Achieved,
}

/// A profile by step and kernel.
pub fn by_kernel(
    header: &Header,
    profile: &[ProfileRow],
    requests: &Requests,
    limits: Option<&Limits>,
) -> BTreeMap<String, KernelShare> {
    let key = |step: &str, kernel: &str| format!("{step}: {kernel}");
    let mut work: BTreeMap<String, Tally> = BTreeMap::new();
    for_each_launch(header, requests, &mut |step, kernel, cost| {
        work.entry(key(&header.steps[step].name, &header.kernels[kernel].name)).or_default().add(cost, limits);
    });
    let mut times: BTreeMap<String, (u64, f64)> = BTreeMap::new();
    for row in profile {
        let time = times.entry(key(&row.step, &row.kernel)).or_default();
        *time = (time.0 + row.time.runs, time.1 + row.time.total.as_secs_f64() * 1e6);
    }
    let share = |(name, (launches, total_us)): (String, (u64, f64))| {
        let achieved = Achieved::new(work.get(&name).unwrap_or(&Tally::default()), total_us);
        (name, KernelShare { launches, total_us, achieved })
    };
    times.into_iter().map(share).collect()
}

/// A profile as a table, the longest first.
pub fn profile_table(name: &str, shares: &BTreeMap<String, KernelShare>) -> String {
    let mut shares: Vec<_> = shares.iter().collect();
    shares.sort_by(|a, b| b.1.total_us.total_cmp(&a.1.total_us));
    let all: f64 = shares.iter().map(|(_, s)| s.total_us).sum();
    let rows = shares.iter().map(|(kernel, s)| {
        let runs = s.launches.max(1) as f64;
        let one = Achieved { flop: s.achieved.flop / runs, bytes: s.achieved.bytes / runs, ..s.achieved };
        let times = [
            kernel.to_string(),
            s.launches.to_string(),
            format!("{:.1}", s.total_us / runs),
            format!("{:.1} %", 100.0 * s.total_us / all),
        ];
        [times.to_vec(), one.cells()].concat()
    });
    super::table(&[&[name, "launches", "us each", "share"][..], &HEADER].concat(), rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsc_ir::DType;

    #[test]
    fn rates_are_work_over_time() {
        let limits = Limits { bytes_per_s: 1e9, flop_per_s: vec![(DType::F32, 1e12)], source: String::new() };
        let mut tally = Tally::default();
        // One launch is bound by its bytes, the other by its products.
        tally.add(&Cost { bytes: 1e3, flop: [(DType::F32, 1e5)].into() }, Some(&limits));
        tally.add(&Cost { bytes: 0.0, flop: [(DType::F32, 3e6)].into() }, Some(&limits));
        let achieved = Achieved::new(&tally, 8.0);
        assert_eq!(achieved.share_of_limit, Some(0.5));
        assert_eq!(achieved.cells(), ["3.10", "0.0010", "0.388", "0.125", "50 %"]);
        assert_eq!(Summary::of(vec![3.0, 1.0, 2.0]).median_us, 2.0);
    }
}
