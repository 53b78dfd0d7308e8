//! AMD GPUs on the stand-in for HIP: what differs from NVIDIA's. The executor is the same, and tested in the parent.

use super::*;

const MINOR: usize = 3;

/// HIP 6.4 and an MI300X, with changes.
fn fake(settings: &[(usize, u64)]) -> Fake {
    Fake::of(Vendor::Amd, settings)
}

/// A header with kernel `count`, and its code object (`HSAC` and its name).
fn amd_header() -> (Header, Vec<u8>) {
    let (mut header, _, _) = gpu_header();
    header.target = "gfx942".into();
    let gpu = header.kernels[0].gpu.as_mut().unwrap();
    (gpu.shared_bytes, gpu.asm) = (0, [0, 0]);
    (header, b"HSACcount\0".to_vec())
}

fn loaded(fake: &Fake) -> GpuDevice {
    let (header, native) = amd_header();
    let mut device = fake.device().unwrap();
    device.load_code(&header, Code::native(&native)).unwrap();
    device
}

#[test]
fn a_machine_without_rocm_or_gpu_is_told_what_to_do() {
    let none = GpuDevice::open_with(Vendor::Amd, Path::new("/nowhere/libamdhip64.so"), 0, 1);
    let error = none.err().unwrap().to_string();
    assert!(error.contains("no HIP library, which artifacts for gfx* targets need: cannot load /nowhere"), "{error}");
    assert!(error.contains("; use a machine with ROCm, or compile"), "{error}");
    let refusal = |settings| fake(settings).device().err().unwrap().to_string();
    assert!(refusal(&[(DEVICES, 0)]).contains("HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES do not hide it"));
    let old = refusal(&[(VERSION, 50_731_921)]);
    assert!(old.contains("the HIP library is too old: it serves HIP 5.7, and HIP 6 is needed; update ROCm"), "{old}");
    // CUDA's driver has none of its functions.
    let cuda = Fake::new(&[]);
    let other = GpuDevice::open_with(Vendor::Amd, &cuda.path, 0, 1).err().unwrap().to_string();
    assert!(other.contains("an unknown version, and hipInit is needed"), "{other}");
}

#[test]
fn the_gpu_is_described() {
    let told = "Fake Instinct, architecture gfx94x, 304 compute units, driver for HIP 6.4";
    assert_eq!(fake(&[]).device().unwrap().describe(), told);
}

#[test]
fn code_for_another_gpu_is_refused() {
    let (mut header, native) = amd_header();
    let refused = |fake: Fake, header: &Header, native: &[u8]| fake.refusal(header, Code::native(native));
    let error = refused(fake(&[(MINOR, 5)]), &header, &native);
    let told = "for gfx942, which GPU 0 (Fake Instinct), of architecture gfx95x, does not run; compile";
    assert!(error.contains(told), "{error}");
    // Of the same architecture, but another stepping: HIP says so.
    header.kernels[0].code_bytes = 12;
    let error = refused(fake(&[]), &header, b"HSACforeign\0");
    assert!(error.contains("for gfx942, which GPU 0 (Fake Instinct), of architecture gfx94x"), "{error}");
    header.kernels[0].code_bytes = 11;
    let error = refused(fake(&[]), &header, b"HSACbroken\0");
    let told = "refuses the machine code of kernel count: hipModuleLoadData failed with 200: hipErrorInvalidImage";
    assert!(error.contains(told) && error.contains("; update ROCm"), "{error}");
    header.target = "sm_90a".into();
    assert!(refused(fake(&[]), &header, &native).contains("target sm_90a"));
    header.target = "gfx942".into();
    header.kernels[0].code_bytes = 10;
    header.kernels[0].gpu.as_mut().unwrap().cluster = 2;
    assert!(refused(fake(&[]), &header, &native).contains("hipModuleLaunchKernel failed with 801"));
    header.kernels[0].gpu.as_mut().unwrap().resources =
        Some(Resources { static_shared_bytes: 70_000, ..Resources::default() });
    assert!(refused(fake(&[]), &header, &native).contains("70000 bytes of shared memory a block (it has 65536)"));
}

#[test]
fn steps_run_one_by_one_then_as_a_graph() {
    let fake = fake(&[]);
    let mut device = loaded(&fake);
    let buffer = device.alloc(4 * 1000, "test").unwrap();
    let limits = SymValues([996, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[0, 0, 4]), &limits).unwrap();
    fake.log();
    let line = |blocks| format!("launch count {blocks}x1x1 of 128, 0 bytes");
    for _ in 0..2 {
        device.run(bound, 0..3, &limits.with(Sym::T, 60), None).unwrap();
    }
    let [first, graph] = [["to device 24"].as_slice(), &["capture", "graph of 3"]];
    let three = [line(60), line(60), line(60)];
    let expected: Vec<String> =
        [first, graph].iter().flat_map(|calls| calls.iter().map(|c| (*c).to_owned()).chain(three.clone())).collect();
    assert_eq!(fake.log(), expected);
    let found = counts(&mut device, buffer, 62);
    let expected = |cell: usize| 4 * u32::from(cell < 60) + 2 * u32::from((1..61).contains(&cell));
    assert!(found.iter().enumerate().all(|(cell, &n)| n == expected(cell)), "{found:?}");
    fake.set(FAULT, 700);
    let error = device.read(buffer, 0, &mut [0; 4]).unwrap_err().to_string();
    assert_eq!(error, "hipStreamSynchronize failed with 700: hipErrorIllegalAddress, as the test asked");
    fake.set(FAULT, 0);
    drop(device);
    assert_eq!(fake.used(), 0);
}

#[test]
fn grids_are_counted_in_threads() {
    let fake = fake(&[]);
    let device = loaded(&fake);
    let kernels = device.loaded.kernels.as_ref().unwrap();
    let kernel = &kernels.kernels[0];
    let check = |tokens| {
        let limits = SymValues([tokens, 1, 1, 1, 1, 1]);
        bind::check_grid(&kernel.entry, &kernel.gpu, super::super::hip::SPEC.most_blocks, &limits)
    };
    assert!(check(33_554_430).is_ok());
    let error = check(33_554_431).unwrap_err();
    assert!(error.contains("33554431 blocks along axis 0"), "{error}");
}

#[test]
fn models_run_where_they_were_compiled_for() {
    let (mut header, native) = amd_header();
    let dir = tempfile::tempdir().unwrap();
    write_artifact(dir.path(), &mut header, &native);
    write_checkpoint(dir.path());
    let fake = fake(&[]);
    let (passed, said) = run_model(fake.vendor, &fake.path, dir.path());
    assert!(passed, "{said}");
    let (passed, said) = run_model(fake.vendor, Path::new("/nowhere/libamdhip64.so"), dir.path());
    assert!(!passed && said.contains("no HIP library"), "{said}");
}
